"""BLIP-2: BLIP's vision tower, and a Q-Former that attends to its tokens by their sizes."""

from transformers.models.blip_2.modeling_blip_2 import (
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Model,
    Blip2VisionModel,
    Blip2VisionModelWithProjection,
)

from .blip import BLIP_LAYER, BLIP_PARTS
from .family import Family
from .readers import WeighedCrossAttention


ATTENDING = (Blip2Model, Blip2VisionModelWithProjection, Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval)
FAMILY = Family(
    encoders={Blip2VisionModel: "encoder.layers"},
    anatomy=BLIP_LAYER,
    models={Blip2VisionModel: "tokens", **dict.fromkeys(ATTENDING, "weighed")},
    composites=ATTENDING,
    layer_parts=BLIP_PARTS,
    model_parts={"qformer": WeighedCrossAttention},
)
