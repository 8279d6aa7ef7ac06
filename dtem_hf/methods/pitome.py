"""PiToMe: the tokens that many others resemble merge, the others are protected (METHOD.md section 9)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .. import ops
from ..configuration import PiToMeConfig
from ..costs import MetricCost
from ..token_state import TokenState
from .matching import KeyMatchingMethod, record_hosts


class PiToMe(KeyMatchingMethod[PiToMeConfig]):
    """Merged by the size-weighted mean, as ToMe does."""

    config_class: ClassVar[type[PiToMeConfig]] = PiToMeConfig
    merges_halves: ClassVar[bool] = False

    def metric_cost(self) -> MetricCost:
        return super().metric_cost()._replace(compared="all")

    def margin(self, layer: int) -> float:
        """The cosine above which two tokens count as alike in a layer."""
        first, last = self.config.margin, self.config.last_margin
        return first + (last - first) * layer / max(self.geometry.num_layers - 1, 1)

    def merge(self, x: Tensor, metric: Tensor, r: int, training: bool, state: TokenState) -> Tensor:
        index, prefix = state.layer, state.num_prefix_tokens
        hosts = ops.match_by_energy(metric, r, self.margin(index), prefix, state.padding(index))
        before = state.sizes(index)
        before = torch.ones(x.shape[:2], device=x.device) if before is None else before
        merged, sizes = ops.merge_into(x, before, hosts)
        record_hosts(state, merged, sizes, hosts)
        return merged
