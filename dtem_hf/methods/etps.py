"""eTPS: the patches that the CLS token attends to least join those that they resemble (METHOD.md section 9)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from .. import ops
from ..configuration import ETPSConfig
from ..costs import MetricCost
from ..token_state import TokenState
from .matching import squeeze
from .ranking import RankingMethod


class ETPS(RankingMethod[ETPSConfig]):
    """EViT's ranking; each pruned patch goes to one kept patch, its host, and counts by how alike they are."""

    config_class: ClassVar[type[ETPSConfig]] = ETPSConfig

    def metric_cost(self) -> MetricCost:
        return super().metric_cost()._replace(width=self.geometry.hidden_size, compared="leaving")

    def shorten(self, x: Tensor, sizes: Tensor, scores: Tensor, r: int, state: TokenState) -> Tensor:
        kept, pruned = ops.split_by_score(scores, x.shape[1] - state.num_prefix_tokens - r, state.num_prefix_tokens)
        return squeeze(x, sizes, kept, pruned, state)
