"""TIPSv2: DINOv2's layers; CLS and registers, then the patches; alone or in a dual encoder."""

from transformers.models.tipsv2.modeling_tipsv2 import Tipsv2Model, Tipsv2VisionModel

from .dinov2 import DINOV2_LAYER, DINOV2_LAYER_PARTS
from .family import Family


# TIPSv2's backbone is left out: transformers has it under two configs, and `register` can take only one.
FAMILY = Family(
    encoders={Tipsv2VisionModel: "encoder.layer"},
    anatomy=DINOV2_LAYER,
    models={Tipsv2Model: "tokens", Tipsv2VisionModel: "tokens"},
    composites=(Tipsv2Model,),
    layer_parts=DINOV2_LAYER_PARTS,
)
