"""SmolVLM's vision tower: SigLIP's layers on images of any shape; no prefix token, and padding."""

from __future__ import annotations

from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionTransformer

from .clip import CLIP_LAYER
from .padded_patches import PaddedPatchesFamily


FAMILY = PaddedPatchesFamily(
    encoders={SmolVLMVisionTransformer: "encoder.layers"},
    anatomy=CLIP_LAYER,
    models={SmolVLMVisionTransformer: "tokens"},
    num_prefix_tokens=0,
)
