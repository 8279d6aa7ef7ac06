"""DeiT with a distillation token: CLS, distillation, then the patches."""

from transformers.models.deit.modeling_deit import (
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTModel,
)

from .family import Family
from .vit import VIT_LAYER


FAMILY = Family(
    encoders={DeiTModel: "layers"},
    anatomy=VIT_LAYER,
    models=dict.fromkeys([DeiTModel, DeiTForImageClassification, DeiTForImageClassificationWithTeacher], "tokens"),
    num_prefix_tokens=2,
)
