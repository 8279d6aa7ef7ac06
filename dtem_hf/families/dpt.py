"""DPT with its built-in ViT: heads that read the tokens of several layers, in place."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.models.dpt.modeling_dpt import DPTForDepthEstimation, DPTForSemanticSegmentation, DPTModel

from ..errors import UnsupportedModelError
from .family import Family
from .older_vit import OLDER_VIT_LAYER, OLDER_VIT_PARTS, OlderViTMerging


class DPTFamily(Family):
    """A hybrid DPT has a convolutional network in front of its layers."""

    def check(self, model: nn.Module, encoder: Any) -> None:
        if encoder.config.is_hybrid:
            raise UnsupportedModelError(
                "is_hybrid=True: its tokens come from a convolutional network, not from patches."
            )


HEADS = (DPTForDepthEstimation, DPTForSemanticSegmentation)
FAMILY = DPTFamily(
    encoders={DPTModel: "encoder.layer"},
    anatomy=OLDER_VIT_LAYER,
    models={DPTModel: "tokens", **dict.fromkeys(HEADS, "grid")},
    composites=HEADS,
    layer_parts=OLDER_VIT_PARTS,
    layer_merging=OlderViTMerging,
)
