"""DINOv2 with registers."""

from transformers import (
    Dinov2WithRegistersBackbone,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
)

from tests.support.family_case import FamilyCase, Row
from tests.support.slow_anatomies import dinov2_like


CASE = FamilyCase(
    "dinov2_with_registers",
    encoder=Dinov2WithRegistersModel,
    rows=(Row(Dinov2WithRegistersForImageClassification, dinov2_like("dinov2_with_registers.", registers=3)),),
    others=(Dinov2WithRegistersBackbone,),
    vision={"mlp_ratio": 2, "num_register_tokens": 3},
)
