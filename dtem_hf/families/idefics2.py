"""Idefics 2's vision tower: SigLIP's layers on images of any shape; no prefix token; padding."""

from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionTransformer

from .clip import CLIP_LAYER
from .family import Family


FAMILY = Family(
    encoders={Idefics2VisionTransformer: "encoder.layers"},
    anatomy=CLIP_LAYER,
    models={Idefics2VisionTransformer: "tokens"},
    num_prefix_tokens=0,
    padding_mask="patch_attention_mask",
)
