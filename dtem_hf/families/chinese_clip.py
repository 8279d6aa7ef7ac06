"""Chinese CLIP: CLIP's vision tower beside a BERT."""

from transformers.models.chinese_clip.modeling_chinese_clip import ChineseCLIPModel, ChineseCLIPVisionModel

from .clip import CLIP_LAYER
from .family import Family


FAMILY = Family(
    encoders={ChineseCLIPVisionModel: "encoder.layers"},
    anatomy=CLIP_LAYER,
    models={ChineseCLIPModel: "tokens", ChineseCLIPVisionModel: "tokens"},
    composites=(ChineseCLIPModel,),
)
