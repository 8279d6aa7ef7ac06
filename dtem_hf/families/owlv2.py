"""OWLv2: CLIP's layers; a dual encoder, or a detector whose heads read all patches, in place."""

from transformers.models.owlv2.modeling_owlv2 import (
    Owlv2ForObjectDetection,
    Owlv2Model,
    Owlv2VisionModel,
    Owlv2VisionTransformer,
)

from .clip import CLIP_LAYER
from .family import Family


FAMILY = Family(
    encoders={Owlv2VisionTransformer: "encoder.layers"},
    anatomy=CLIP_LAYER,
    models={Owlv2Model: "tokens", Owlv2VisionModel: "tokens", Owlv2ForObjectDetection: "grid"},
    composites=(Owlv2Model, Owlv2ForObjectDetection),
)
