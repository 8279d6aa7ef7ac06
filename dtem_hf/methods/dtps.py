"""dTPS: patches that a learned network scores low join those that they resemble (METHOD.md section 9)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import ops
from ..configuration import DTPSConfig
from ..costs import MetricCost
from ..embedding import DecoupledEmbedding, EmbeddingShape, KeyProjection, initialize_randomly, predictor_widths
from ..token_state import TokenState
from .base import MergedLayer, Method
from .matching import record_matched


class DTPS(Method[DTPSConfig]):
    """Pruning and squeezing in front of layers, each of which has a predictor of its own.

    The same in training: the choice of tokens is hard, and no gradient reaches a predictor.
    """

    config_class: ClassVar[type[DTPSConfig]] = DTPSConfig
    pairwise: ClassVar[bool] = False
    between: ClassVar[bool] = True

    def embedding_shape(self) -> EmbeddingShape:
        g = self.geometry
        return EmbeddingShape(g.num_layers, g.hidden_size, 0, predictors=len(self._layers))

    @property
    def _layers(self) -> list[int]:
        return self.config.schedule.chosen(self.geometry.num_layers)

    def initialize(self, embedding: DecoupledEmbedding, keys: Sequence[KeyProjection], std: float) -> None:
        if self._layers:
            initialize_randomly(embedding, std, seed=0)  # two models that are attached alike give the same outputs

    def metric_cost(self) -> MetricCost:
        width, prefix = self.geometry.hidden_size, self.geometry.num_prefix_tokens
        per_token = sum(inner * outer for inner, outer in predictor_widths(width).values())
        return MetricCost(per_token, per_image=-prefix * per_token, width=width, compared="leaving")

    def reduce(self, x: Tensor, normed: Tensor, layer: MergedLayer, state: TokenState, bias: Tensor | None) -> Tensor:
        index, prefix, num_tokens = state.layer, state.num_prefix_tokens, x.shape[1]
        _, r = state.begin_layer(index, num_tokens)
        if r == 0:
            state.record_unchanged(index, x)
            return x
        assert state.embedding is not None
        empty, before = state.padding(index), state.sizes(index)
        before = torch.ones(x.shape[:2], device=x.device) if before is None else before
        counted = torch.ones_like(before) if empty is None else (~empty).float()
        predictor = state.embedding.predictors[self._layers.index(index + 1)]
        scores = predictor(x[:, prefix:], counted[:, prefix:])[..., 0]
        if empty is not None:
            scores = scores.masked_fill(empty[:, prefix:], -torch.inf)
        kept, pruned = ops.split_by_score(F.pad(scores, [prefix, 0]), num_tokens - prefix - r, prefix)
        matching, weights = ops.squeeze_hosts(x, kept, pruned, empty)
        squeezed, _ = ops.merge_tokens(x, weights, matching)
        _, sizes = ops.merge_tokens(before.unsqueeze(-1), before, matching)
        record_matched(state, squeezed, sizes, matching, num_tokens)
        return squeezed
