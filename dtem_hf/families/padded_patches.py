"""Images of several sizes in one batch, of which a mask over patches says what is padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .family import Family


class PaddedPatchesFamily(Family):
    """Padding has size 0, and is never merged with anything."""

    def padding_sizes(self, encoder: nn.Module, inputs: Mapping[str, Any]) -> Tensor | None:
        mask = inputs.get("patch_attention_mask")  # [B, rows, columns]
        return None if mask is None else mask.flatten(1).float()
