"""DINOv2 with registers: CLS, the registers, then the patches."""

from transformers.models.dinov2_with_registers import modeling_dinov2_with_registers as modeling

from .dinov2 import DINOV2_LAYER, DINOV2_LAYER_PARTS
from .family import Family


FAMILY = Family(
    encoders={modeling.Dinov2WithRegistersModel: "encoder.layer", modeling.Dinov2WithRegistersEncoder: "layer"},
    anatomy=DINOV2_LAYER,
    models={
        modeling.Dinov2WithRegistersModel: "tokens",
        modeling.Dinov2WithRegistersForImageClassification: "mean",
        modeling.Dinov2WithRegistersBackbone: "grid",
    },
    layer_parts=DINOV2_LAYER_PARTS,
)
