"""InstructBLIP: BLIP-2 with a Q-Former that also reads the instruction."""

from transformers.models.instructblip.modeling_instructblip import (
    InstructBlipForConditionalGeneration,
    InstructBlipModel,
    InstructBlipVisionModel,
)

from .blip import BLIP_LAYER, BLIP_PARTS
from .family import Family
from .readers import WeighedCrossAttention


ATTENDING = (InstructBlipModel, InstructBlipForConditionalGeneration)
FAMILY = Family(
    encoders={InstructBlipVisionModel: "encoder.layers"},
    anatomy=BLIP_LAYER,
    models={InstructBlipVisionModel: "tokens", **dict.fromkeys(ATTENDING, "weighed")},
    composites=ATTENDING,
    layer_parts=BLIP_PARTS,
    model_parts={"qformer": WeighedCrossAttention},
)
