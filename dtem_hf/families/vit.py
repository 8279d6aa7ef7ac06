"""ViT, and DeiT as it is published on the Hub (without its distillation token): one CLS token, then the patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers.models.vit.modeling_vit import ViTForImageClassification, ViTModel

from ..token_state import TokenState
from .base import Backbone, LayerMerging, linear_cost
from .transition import LayerParts, OpenAttention, drop


class ViTLayerMerging(LayerMerging):
    """Merging between the attention and the MLP of a `ViTLayer`."""

    def fused_parts(self: Any) -> LayerParts:
        return LayerParts(self.layernorm_before, self.attention, self.layernorm_after, self.mlp, (self.dropout,))

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        token_state: TokenState | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if token_state is None:
            return super().forward(hidden_states, attention_mask, **kwargs)  # type: ignore[misc]
        fused = self.run_fused(hidden_states, attention_mask, token_state, kwargs)
        if fused is not None:
            return fused
        normed = self.layernorm_before(hidden_states)
        bias = self.attention_bias(hidden_states, attention_mask, token_state)
        attended, inside = self.run_attention(self.attention, token_state, normed, bias, **kwargs)
        attended = drop(self.dropout, attended) + inside.rows(hidden_states)
        hidden_states = self.merge_step(attended, normed, token_state, bias, inside=inside)
        return drop(self.dropout, self.run_mlp(self.layernorm_after(hidden_states), token_state)) + hidden_states


class ViTLike(Backbone):
    """Families whose layers are built like those of ViT."""

    layer_merging = ViTLayerMerging
    open_attention = OpenAttention

    def layers(self, encoder: Any) -> Sequence[nn.Module]:
        return encoder.layers

    def num_prefix_tokens(self, encoder: nn.Module) -> int:
        return 1

    def attention(self, layer: Any) -> nn.Module:
        return layer.attention

    def key_linear(self, layer: Any) -> tuple[nn.Module, int]:
        return layer.attention.k_proj, layer.attention.num_attention_heads

    def query_linear(self, layer: Any) -> nn.Module:
        return layer.attention.q_proj

    def row_cost(self, layer: Any) -> int:
        return linear_cost([layer.attention.q_proj, layer.attention.o_proj])


class ViTFamily(ViTLike):
    encoder_class = ViTModel
    models = {"AutoModel": (ViTModel,), "AutoModelForImageClassification": (ViTForImageClassification,)}
    prefix_readers = (ViTForImageClassification,)
