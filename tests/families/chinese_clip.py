"""Chinese CLIP."""

from transformers import ChineseCLIPModel, ChineseCLIPVisionModel

from tests.families.clip import clip_head
from tests.support.family_case import FamilyCase, Row
from tests.support.slow_anatomies import clip_like


CASE = FamilyCase(
    "chinese_clip",
    encoder=ChineseCLIPVisionModel,
    rows=(Row(ChineseCLIPVisionModel, clip_like("", clip_head), "pooler_output"),),
    others=(ChineseCLIPModel,),
    text={"pad_token_id": None},  # transformers sets this row of a checkpoint's word embeddings to zero
)
