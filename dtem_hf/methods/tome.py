"""ToMe: tokens are compared by their attention keys, averaged over heads (METHOD.md section 2)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .. import ops
from ..configuration import ToMeConfig
from ..schedule import MetricCost
from ..token_state import TokenState
from .base import MergedLayer
from .matching import MatchingMethod


class ToMe(MatchingMethod[ToMeConfig]):
    """Nothing to learn; hard in training as well."""

    config_class: ClassVar[type[ToMeConfig]] = ToMeConfig

    def metric_cost(self) -> MetricCost:
        return MetricCost(0, width=self.geometry.head_dim)  # attention has computed the keys

    def metric(self, normed: Tensor, layer: MergedLayer, state: TokenState) -> Tensor:
        # The sum points where the mean does.
        keys = layer.keys(normed, state).detach()
        if ops.exports_openvino():
            first, *others = keys.float().unbind(-2)
            return sum(others, start=first)
        return keys.sum(dim=-2, dtype=torch.float32)
