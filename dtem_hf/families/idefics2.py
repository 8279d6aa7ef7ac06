"""Idefics 2's vision tower: SigLIP's layers on images of any shape; no prefix token, and padding."""

from __future__ import annotations

from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionTransformer

from .clip import CLIP_LAYER
from .padded_patches import PaddedPatchesFamily


FAMILY = PaddedPatchesFamily(
    encoders={Idefics2VisionTransformer: "encoder.layers"},
    anatomy=CLIP_LAYER,
    models={Idefics2VisionTransformer: "tokens"},
    num_prefix_tokens=0,
)
