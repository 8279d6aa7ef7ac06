"""SmolVLM's vision tower: SigLIP's layers on images of any shape; no prefix token; padding."""

from dataclasses import replace

from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionTransformer

from .idefics2 import FAMILY as IDEFICS2


FAMILY = replace(
    IDEFICS2, encoders={SmolVLMVisionTransformer: "encoder.layers"}, models={SmolVLMVisionTransformer: "tokens"}
)
