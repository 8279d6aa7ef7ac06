"""OWL-ViT: CLIP's layers; a dual encoder, or a detector whose heads read all patches, in place."""

from transformers.models.owlvit.modeling_owlvit import (
    OwlViTForObjectDetection,
    OwlViTModel,
    OwlViTVisionModel,
    OwlViTVisionTransformer,
)

from .clip import CLIP_LAYER
from .family import Family


FAMILY = Family(
    encoders={OwlViTVisionTransformer: "encoder.layers"},
    anatomy=CLIP_LAYER,
    models={OwlViTModel: "tokens", OwlViTVisionModel: "tokens", OwlViTForObjectDetection: "grid"},
    composites=(OwlViTModel, OwlViTForObjectDetection),
)
