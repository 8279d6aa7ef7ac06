"""InternVL's vision tower: ViT's layers with layer scale; CLS, then the patches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn
from transformers.models.internvl.modeling_internvl import InternVLVisionModel

from ..errors import UnsupportedModelError
from .family import Family
from .vit import VIT_LAYER


class InternVLFamily(Family):
    """If attention normalises its keys, the keys that tokens are compared by would not be the normalised ones."""

    def check(self, model: nn.Module, encoder: Any) -> None:
        if encoder.config.use_qk_norm:
            raise UnsupportedModelError("use_qk_norm=True: tokens would be compared by keys that are not normalised.")


FAMILY = InternVLFamily(
    encoders={InternVLVisionModel: "encoder.layer"},
    anatomy=replace(VIT_LAYER, heads="attention.num_heads", branch1=("lambda_1",), branch2=("dropout", "lambda_2")),
    models={InternVLVisionModel: "tokens"},
)
