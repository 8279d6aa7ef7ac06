"""MetaCLIP 2: CLIP's vision tower beside a multilingual text tower."""

from transformers.models.metaclip_2.modeling_metaclip_2 import (
    MetaClip2ForImageClassification,
    MetaClip2Model,
    MetaClip2VisionModel,
    MetaClip2VisionModelWithProjection,
)

from .clip import CLIP_LAYER
from .family import Family


FAMILY = Family(
    encoders={MetaClip2VisionModel: "encoder.layers"},
    anatomy=CLIP_LAYER,
    models={
        MetaClip2Model: "tokens",
        MetaClip2VisionModel: "tokens",
        MetaClip2VisionModelWithProjection: "tokens",
        MetaClip2ForImageClassification: "mean",
    },
    composites=(MetaClip2Model,),
)
