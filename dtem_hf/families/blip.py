"""BLIP: a CLIP-like vision tower with one projection for queries, keys and values; its attention takes no mask."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.blip.modeling_blip import (
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipModel,
    BlipVisionModel,
)

from ..embedding import KeyProjection
from .clip import CLIPLayerMerging, CLIPLike
from .masked_attention import attend
from .readers import ReadingAlike
from .transition import has_own_weight


class BlipLayerMerging(CLIPLayerMerging):
    """Merging in a `BlipEncoderLayer`, whose stock forward pass knows no mask."""

    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, token_state: Any = None, **kwargs: Any
    ) -> Tensor:
        if token_state is None:
            return super(CLIPLayerMerging, self).forward(hidden_states, **kwargs)  # type: ignore[misc]
        return super().forward(hidden_states, attention_mask, token_state, **kwargs)


class BlipMaskedAttention:
    """`BlipAttention` with an additive mask: its weights are always recorded, as in the stock module."""

    def forward(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        if attention_mask is None:
            return super().forward(hidden_states, **kwargs)  # type: ignore[misc]
        # [B, n, 3 · H · d] -> 3 × [B, H, n, d]
        q, k, v = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.dropout.p if self.training else 0.0
        mixed, weights = attend(q, k, v, attention_mask, self.scale, dropout, weights=True)
        return self.projection(mixed), weights


class BlipFamily(CLIPLike):
    encoder_class = BlipVisionModel
    models = {
        "AutoModel": (BlipModel,),
        "AutoModelForImageTextToText": (BlipForConditionalGeneration,),
        "AutoModelForVisualQuestionAnswering": (BlipForQuestionAnswering,),
        "AutoModelForZeroShotImageClassification": (BlipModel,),
    }
    other_models = (BlipVisionModel, BlipForImageTextRetrieval)
    composites = (BlipModel, BlipForConditionalGeneration, BlipForQuestionAnswering, BlipForImageTextRetrieval)
    layer_merging = BlipLayerMerging

    def key_linear(self, layer: Any) -> tuple[nn.Module, int]:
        return layer.self_attn.qkv, layer.self_attn.num_heads

    def query_linear(self, layer: Any) -> nn.Module:
        return layer.self_attn.qkv

    def key_projection(self, layer: Any) -> KeyProjection:
        qkv = layer.self_attn.qkv
        return KeyProjection(qkv.weight.chunk(3)[1], qkv.bias.chunk(3)[1], layer.self_attn.num_heads)

    def queries(self, layer: Any, normed: Tensor) -> Tensor:
        return self._part(0, layer, normed)

    def keys(self, layer: Any, normed: Tensor) -> Tensor:
        return self._part(1, layer, normed)

    def _part(self, part: int, layer: Any, normed: Tensor) -> Tensor:
        qkv, heads = layer.self_attn.qkv, layer.self_attn.num_heads
        if has_own_weight(qkv):
            return F.linear(normed, qkv.weight.chunk(3)[part], qkv.bias.chunk(3)[part]).unflatten(-1, (heads, -1))
        # Whatever else stands there computes all three at once.
        return qkv(normed).unflatten(-1, (3, heads, -1))[..., part, :, :]

    def model_mixins(self, model_class: type) -> tuple[type, ...]:
        attending = (BlipForConditionalGeneration, BlipForImageTextRetrieval, BlipForQuestionAnswering)
        return (ReadingAlike,) if issubclass(model_class, attending) else super().model_mixins(model_class)

    def readers(self, model: nn.Module, encoder: nn.Module) -> Iterator[tuple[nn.Module, type]]:
        for layer in self.layers(encoder):
            yield layer.self_attn, BlipMaskedAttention  # type: ignore[misc]
