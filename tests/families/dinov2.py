"""DINOv2."""

from transformers import Dinov2Backbone, Dinov2ForImageClassification, Dinov2Model

from tests.support.family_case import FamilyCase, Row
from tests.support.slow_anatomies import dinov2_like


CASE = FamilyCase(
    "dinov2",
    encoder=Dinov2Model,
    rows=(Row(Dinov2ForImageClassification, dinov2_like("dinov2.")),),
    others=(Dinov2Backbone,),
    vision={"mlp_ratio": 2},
)
