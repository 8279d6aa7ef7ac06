"""PiToMe: tokens that are similar to many others merge, distinct tokens are protected (docs/method.md section 9)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from .. import ops
from ..configuration import PiToMeConfig
from ..costs import MetricCost
from ..token_state import TokenState
from .matching import KeyMatchingMethod, record_matched


class PiToMe(KeyMatchingMethod):
    """Match by energy, and merge by the size-weighted mean, as ToMe does."""

    config_class = PiToMeConfig
    merges_halves: ClassVar[bool] = False

    def metric_cost(self) -> MetricCost:
        return super().metric_cost()._replace(compared="all")

    def margin(self, layer: int) -> float:
        """The cosine above which two tokens count as alike, in a layer: linear from `margin` to `last_margin`."""
        first, last = self.config.margin, self.config.last_margin
        return first + (last - first) * layer / max(self.geometry.num_layers - 1, 1)

    def merge(self, x: Tensor, metric: Tensor, r: int, training: bool, state: TokenState) -> Tensor:
        index, prefix = state.layer, state.num_prefix_tokens
        matching = ops.match_by_energy(metric, r, self.margin(index), prefix, state.padding(index))
        merged, sizes = ops.merge_tokens(x, state.sizes(index), matching)
        record_matched(state, merged, sizes, matching)
        return merged
