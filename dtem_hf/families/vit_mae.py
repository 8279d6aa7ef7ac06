"""ViT-MAE: only the patches that a random mask leaves enter the encoder, in shuffled order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEForPreTraining, ViTMAEModel

from ..costs import EncoderCost, MetricCost
from .family import Family
from .vit import VIT_LAYER


class MaskedFamily(Family):
    """All patches are embedded, but only the unmasked ones enter the layers."""

    def num_tokens(self, encoder: Any, image_size: int | tuple[int, int] | None = None) -> int:
        patches = super().num_tokens(encoder, image_size) - self.num_prefix_tokens
        return int(patches * (1 - encoder.config.mask_ratio)) + self.num_prefix_tokens

    def encoder_cost(self, model: nn.Module, encoder: Any, metric: MetricCost) -> EncoderCost:
        cost = super().encoder_cost(model, encoder, metric)
        return replace(cost, stem=round(cost.stem / (1 - encoder.config.mask_ratio)))


# The decoder puts every patch back in its place, so it reads the grid.
FAMILY = MaskedFamily(
    encoders={ViTMAEModel: "layers"},
    anatomy=VIT_LAYER,
    models={ViTMAEModel: "tokens", ViTMAEForPreTraining: "grid"},
    composites=(ViTMAEForPreTraining,),
)
