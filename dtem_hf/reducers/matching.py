"""What ToMe and DTEM share: merge r tokens per layer by bipartite soft matching on some metric."""

from __future__ import annotations

from abc import abstractmethod
from typing import TypeVar

import torch
from torch import Tensor, nn

from .. import ops
from ..configuration import MatchingConfig
from ..schedule import Schedule
from ..token_state import TokenState
from .base import Reducer


M = TypeVar("M", bound=MatchingConfig)


class MatchingReducer(Reducer[M]):
    """Hard bipartite soft matching; a subclass says by which metric."""

    @property
    def schedule(self) -> Schedule:
        return self.config.schedule

    @abstractmethod
    def metric(self, normed: Tensor, layer: nn.Module, index: int, state: TokenState) -> Tensor:
        """What tokens are compared by: [B, n, D] -> [B, n, d]."""

    def reduce(self, x: Tensor, normed: Tensor, layer: nn.Module, index: int, state: TokenState) -> Tensor:
        active, r = state.enter(index, x.shape[1])
        if r == 0:
            state.leave(index, x, state.sizes(index), active, lambda: _identity(x))
            return x
        return self.merge(x, self.metric(normed, layer, index, state), r, layer, index, state)

    def merge(self, x: Tensor, metric: Tensor, r: int, layer: nn.Module, index: int, state: TokenState) -> Tensor:
        """Merge r tokens of layer `index` by a metric: x [B, n, D], metric [B, n, d] -> [B, n - r, D]."""
        num_tokens = x.shape[1]
        matching = ops.bipartite_soft_matching(metric, r, state.num_prefix_tokens)
        x, sizes = ops.merge_tokens(x, state.sizes(index), matching)
        state.leave(index, x, sizes, num_tokens - r, lambda: ops.source_map(matching, num_tokens))
        return x


def _identity(x: Tensor) -> Tensor:
    """The source map of a layer that merges nothing: [B, n]."""
    return torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
