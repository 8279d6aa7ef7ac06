"""BLIP: a CLIP-like vision tower with one projection for queries, keys and values; its attention takes no mask."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers.models.blip.modeling_blip import (
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipModel,
    BlipVisionModel,
)

from .clip import CLIP_LAYER
from .family import Family
from .masked_attention import attend


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


ATTENDING = (BlipForConditionalGeneration, BlipForQuestionAnswering, BlipForImageTextRetrieval)
FAMILY = Family(
    encoders={BlipVisionModel: "encoder.layers"},
    anatomy=replace(CLIP_LAYER, query="self_attn.qkv", key="self_attn.qkv", packed=True),
    models=dict.fromkeys([BlipModel, BlipVisionModel, *ATTENDING], "tokens"),
    composites=(BlipModel, *ATTENDING),
    layer_parts={"self_attn": BlipMaskedAttention},
)
