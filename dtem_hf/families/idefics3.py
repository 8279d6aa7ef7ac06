"""Idefics 3's vision tower: SigLIP's layers on images of any shape; no prefix token; padding."""

from dataclasses import replace

from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionTransformer

from .idefics2 import FAMILY as IDEFICS2


FAMILY = replace(
    IDEFICS2, encoders={Idefics3VisionTransformer: "encoder.layers"}, models={Idefics3VisionTransformer: "tokens"}
)
