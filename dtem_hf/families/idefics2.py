"""Idefics 2's vision tower: SigLIP's layers on images of any shape; no prefix token; padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionTransformer

from .clip import CLIP_LAYER
from .family import Family


class PaddedPatchesFamily(Family):
    """Batches hold images of several sizes; a mask marks padding patches, and no other token merges with them."""

    def padding_sizes(self, encoder: nn.Module, inputs: Mapping[str, Any]) -> Tensor | None:
        mask = inputs.get("patch_attention_mask")  # [B, rows, columns]
        return None if mask is None else mask.flatten(1).float()


FAMILY = PaddedPatchesFamily(
    encoders={Idefics2VisionTransformer: "encoder.layers"},
    anatomy=CLIP_LAYER,
    models={Idefics2VisionTransformer: "tokens"},
    num_prefix_tokens=0,
)
