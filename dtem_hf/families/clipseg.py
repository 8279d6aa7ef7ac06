"""CLIPSeg: CLIP's dual encoder, and a decoder that reads the tokens of several layers, in place."""

from transformers.models.clipseg.modeling_clipseg import (
    CLIPSegForImageSegmentation,
    CLIPSegModel,
    CLIPSegVisionModel,
)

from .clip import CLIP_LAYER
from .family import Family


FAMILY = Family(
    encoders={CLIPSegVisionModel: "encoder.layers"},
    anatomy=CLIP_LAYER,
    models={CLIPSegModel: "tokens", CLIPSegVisionModel: "tokens", CLIPSegForImageSegmentation: "grid"},
    composites=(CLIPSegModel, CLIPSegForImageSegmentation),
)
