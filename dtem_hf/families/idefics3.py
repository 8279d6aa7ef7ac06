"""Idefics 3's vision tower: SigLIP's layers on images of any shape; no prefix token, and padding."""

from __future__ import annotations

from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionTransformer

from .clip import CLIP_LAYER
from .padded_patches import PaddedPatchesFamily


FAMILY = PaddedPatchesFamily(
    encoders={Idefics3VisionTransformer: "encoder.layers"},
    anatomy=CLIP_LAYER,
    models={Idefics3VisionTransformer: "tokens"},
    num_prefix_tokens=0,
)
