"""DINOv2 with registers: CLS, the registers, then the patches."""

from __future__ import annotations

from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import (
    Dinov2WithRegistersBackbone,
    Dinov2WithRegistersEncoder,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
)

from .dinov2 import Dinov2Like


class Dinov2WithRegistersFamily(Dinov2Like):
    encoder_class = Dinov2WithRegistersEncoder
    models = {
        "AutoModel": (Dinov2WithRegistersModel,),
        "AutoModelForImageClassification": (Dinov2WithRegistersForImageClassification,),
        "AutoBackbone": (Dinov2WithRegistersBackbone,),
    }
    averaging = (Dinov2WithRegistersForImageClassification,)
    dense = (Dinov2WithRegistersBackbone,)
    normalising = Dinov2WithRegistersModel
