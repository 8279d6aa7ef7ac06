"""CLIP: the vision tower, alone or in a dual encoder (whose text tower stays as it is); CLS, then the patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers.models.clip.modeling_clip import (
    CLIPForImageClassification,
    CLIPModel,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)

from ..token_state import TokenState
from .base import Backbone, LayerMerging
from .transition import LayerParts, OpenCLIPAttention


class CLIPLayerMerging(LayerMerging):
    """Merging between the attention and the MLP of a `CLIPEncoderLayer`, and of all that are built like it."""

    def fused_parts(self: Any) -> LayerParts:
        return LayerParts(self.layer_norm1, self.self_attn, self.layer_norm2, self.mlp)

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        token_state: TokenState | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if token_state is None:
            return super().forward(hidden_states, attention_mask=attention_mask, **kwargs)  # type: ignore[misc]
        fused = self.run_fused(hidden_states, attention_mask, token_state, kwargs)
        if fused is not None:
            return fused
        normed = self.layer_norm1(hidden_states)
        bias = self.attention_bias(hidden_states, attention_mask, token_state)
        attended, inside = self.run_attention(
            self.self_attn, token_state, hidden_states=normed, attention_mask=bias, **kwargs
        )
        hidden_states = self.merge_step(
            inside.rows(hidden_states) + attended, normed, token_state, bias, inside=inside
        )
        return hidden_states + self.run_mlp(self.layer_norm2(hidden_states), token_state)


class CLIPLike(Backbone):
    """Families whose layers are built like those of CLIP's vision tower."""

    layer_merging = CLIPLayerMerging
    open_attention = OpenCLIPAttention

    def layers(self, encoder: Any) -> Sequence[nn.Module]:
        return encoder.encoder.layers

    def num_prefix_tokens(self, encoder: nn.Module) -> int:
        return 1

    def attention(self, layer: Any) -> nn.Module:
        return layer.self_attn

    def key_linear(self, layer: Any) -> tuple[nn.Module, int]:
        return layer.self_attn.k_proj, layer.self_attn.num_heads

    def query_linear(self, layer: Any) -> nn.Module:
        return layer.self_attn.q_proj


class CLIPFamily(CLIPLike):
    encoder_class = CLIPVisionModel
    models = {
        "AutoModel": (CLIPModel, CLIPVisionModel),
        "AutoModelForImageClassification": (CLIPForImageClassification,),
        "AutoModelForZeroShotImageClassification": (CLIPModel,),
    }
    other_models = (CLIPVisionModelWithProjection,)
    composites = (CLIPModel,)
    averaging = (CLIPForImageClassification,)
