"""eTPS: patches with little CLS attention join the most similar kept patches (docs/method.md section 9)."""

from __future__ import annotations

from torch import Tensor

from .. import ops
from ..configuration import ETPSConfig
from ..costs import MetricCost
from ..token_state import TokenState
from .matching import squeeze
from .ranking import RankingMethod


class ETPS(RankingMethod):
    """Rank as EViT does; each pruned patch joins one kept patch, its host, weighted by their similarity."""

    config_class = ETPSConfig

    def metric_cost(self) -> MetricCost:
        return super().metric_cost()._replace(width=self.geometry.hidden_size, compared="leaving")

    def shorten(self, x: Tensor, sizes: Tensor, scores: Tensor, r: int, state: TokenState) -> Tensor:
        kept, pruned = ops.split_by_score(scores, x.shape[1] - state.num_prefix_tokens - r, state.num_prefix_tokens)
        return squeeze(x, sizes, kept, pruned, state)
