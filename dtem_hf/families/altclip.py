"""AltCLIP: CLIP's vision tower beside a multilingual RoBERTa."""

from transformers.models.altclip.modeling_altclip import AltCLIPModel, AltCLIPVisionModel

from .clip import CLIP_LAYER
from .family import Family


FAMILY = Family(
    encoders={AltCLIPVisionModel: "encoder.layers"},
    anatomy=CLIP_LAYER,
    models={AltCLIPModel: "tokens", AltCLIPVisionModel: "tokens"},
    composites=(AltCLIPModel,),
)
