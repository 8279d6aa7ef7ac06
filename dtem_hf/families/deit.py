"""DeiT with its distillation token: CLS, distillation, then the patches."""

from __future__ import annotations

from torch import nn
from transformers.models.deit.modeling_deit import (
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTModel,
)

from .vit import ViTLike


class DeiTFamily(ViTLike):
    encoder_class = DeiTModel
    models = {
        "AutoModel": (DeiTModel,),
        "AutoModelForImageClassification": (DeiTForImageClassification, DeiTForImageClassificationWithTeacher),
    }
    prefix_readers = (DeiTForImageClassification, DeiTForImageClassificationWithTeacher)

    def num_prefix_tokens(self, encoder: nn.Module) -> int:
        return 2
