"""AltCLIP."""

from transformers import AltCLIPModel, AltCLIPVisionModel

from tests.families.clip import clip_head
from tests.support.family_case import FamilyCase, Row
from tests.support.slow_anatomies import clip_like


CASE = FamilyCase(
    "altclip",
    encoder=AltCLIPVisionModel,
    rows=(Row(AltCLIPVisionModel, clip_like("", clip_head), "pooler_output"),),
    others=(AltCLIPModel,),
)
