"""ToMe: tokens are compared by their attention keys, averaged over heads (METHOD.md section 2)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from ..configuration import ToMeConfig
from ..embedding import DecoupledEmbedding
from ..schedule import MetricCost
from ..token_state import TokenState
from .base import AttentionInputs, MetricSource
from .matching import MatchingReducer


class ToMeReducer(MatchingReducer[ToMeConfig]):
    """Nothing to learn; hard in training as well."""

    config_class: ClassVar[type[ToMeConfig]] = ToMeConfig

    def initialize(self, embedding: DecoupledEmbedding, encoder: nn.Module) -> None:
        """There is nothing to fill."""

    def metric_cost(self, encoder: nn.Module, layer: nn.Module) -> MetricCost:
        keys = self.backbone.key_projection(layer)
        if self.backbone.hands_out_keys(layer):
            return MetricCost(0, width=keys.head_dim)
        return MetricCost(keys.weight.shape[1] * keys.head_dim, width=keys.head_dim)

    def metric_source(self, layer: nn.Module, index: int, state: TokenState) -> MetricSource | None:
        return MetricSource(None) if state.steps is None else None

    def metric(
        self, normed: Tensor, layer: nn.Module, index: int, state: TokenState, attention: AttentionInputs
    ) -> tuple[Tensor, int]:
        if attention.keys is None:
            return self.backbone.mean_keys(layer, normed), 1
        return attention.keys.detach(), self.backbone.key_linear(layer)[1]
