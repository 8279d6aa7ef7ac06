"""I-JEPA: a ViT without a prefix token; a classifier that averages the patches."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.models.ijepa.modeling_ijepa import IJepaForImageClassification, IJepaModel

from ..errors import UnsupportedModelError
from .family import Family
from .vit import VIT_LAYER


class IJepaFamily(Family):
    """A pooler would read the first patch as if it were a CLS token."""

    def check(self, model: nn.Module, encoder: Any) -> None:
        if encoder.pooler is not None:
            raise UnsupportedModelError("IJepaModel's pooler reads the first patch, which a merge may take away.")


FAMILY = IJepaFamily(
    encoders={IJepaModel: "layers"},
    anatomy=VIT_LAYER,
    models={IJepaModel: "tokens", IJepaForImageClassification: "mean"},
    num_prefix_tokens=0,
)
