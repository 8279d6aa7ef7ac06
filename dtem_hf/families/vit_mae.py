"""ViT-MAE: the encoder sees the share of the patches that its random mask leaves, in their shuffled order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEForPreTraining, ViTMAEModel

from ..schedule import EncoderCost, MetricCost
from .vit import ViTLike


class ViTMAEFamily(ViTLike):
    encoder_class = ViTMAEModel
    models = {"AutoModel": (ViTMAEModel,), "AutoModelForPreTraining": (ViTMAEForPreTraining,)}
    # Its decoder puts every patch back where the mask took it from, and costs what it costs.
    dense = (ViTMAEForPreTraining,)
    composites = (ViTMAEForPreTraining,)

    def num_tokens(self, encoder: Any, image_size: int | tuple[int, int] | None = None) -> int:
        prefix = self.num_prefix_tokens(encoder)
        return int((super().num_tokens(encoder, image_size) - prefix) * (1 - encoder.config.mask_ratio)) + prefix

    def encoder_cost(
        self, model: nn.Module, encoder: Any, metric_cost: Callable[[nn.Module], MetricCost]
    ) -> EncoderCost:
        cost = super().encoder_cost(model, encoder, metric_cost)
        # All patches are embedded before the mask takes its share of them.
        return replace(cost, stem=round(cost.stem / (1 - encoder.config.mask_ratio)))
