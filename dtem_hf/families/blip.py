"""BLIP: a CLIP-like vision tower with one projection for queries, keys and values, and attention without a mask."""

from __future__ import annotations

from dataclasses import replace

from transformers.models.blip.modeling_blip import (
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipModel,
    BlipVisionModel,
)

from .clip import CLIP_LAYER
from .family import Family
from .masked_attention import PackedMaskedAttention


BLIP_LAYER = replace(CLIP_LAYER, query="self_attn.qkv", key="self_attn.qkv", packed=True)
BLIP_PARTS: dict[str, type] = {"self_attn": PackedMaskedAttention}
ATTENDING = (BlipForConditionalGeneration, BlipForQuestionAnswering, BlipForImageTextRetrieval)
FAMILY = Family(
    encoders={BlipVisionModel: "encoder.layers"},
    anatomy=BLIP_LAYER,
    models=dict.fromkeys([BlipModel, BlipVisionModel, *ATTENDING], "tokens"),
    composites=(BlipModel, *ATTENDING),
    layer_parts=BLIP_PARTS,
)
