"""I-JEPA: a ViT without a prefix token; a classifier that averages the patches."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.models.ijepa.modeling_ijepa import IJepaForImageClassification, IJepaModel

from ..errors import UnsupportedModelError
from .vit import ViTLike


class IJepaFamily(ViTLike):
    encoder_class = IJepaModel
    models = {"AutoModel": (IJepaModel,), "AutoModelForImageClassification": (IJepaForImageClassification,)}
    averaging = (IJepaForImageClassification,)

    def num_prefix_tokens(self, encoder: nn.Module) -> int:
        return 0

    def check(self, model: nn.Module, encoder: Any) -> None:
        if encoder.pooler is not None:
            raise UnsupportedModelError("IJepaModel's pooler reads the first patch, which a merge may take away.")
