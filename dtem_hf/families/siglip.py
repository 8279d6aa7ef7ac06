"""SigLIP: no prefix token; a head that attends to the tokens, or a classifier that averages them."""

from transformers.models.siglip.modeling_siglip import SiglipForImageClassification, SiglipModel, SiglipVisionModel

from .clip import CLIP_LAYER
from .family import Family
from .readers import WeighedAttention


FAMILY = Family(
    encoders={SiglipVisionModel: "encoder.layers"},
    anatomy=CLIP_LAYER,
    models={SiglipModel: "tokens", SiglipVisionModel: "tokens", SiglipForImageClassification: "mean"},
    num_prefix_tokens=0,
    composites=(SiglipModel,),
    encoder_parts={"head.attention": WeighedAttention},
)
