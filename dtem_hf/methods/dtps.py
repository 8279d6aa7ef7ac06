"""dTPS: patches with a low learned score join the most similar kept patches (docs/method.md section 9)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import ops
from ..configuration import DTPSConfig
from ..costs import MetricCost
from ..embedding import DecoupledEmbedding, EmbeddingShape, KeyProjection, initialize_randomly, predictor_widths
from ..token_state import TokenState
from .base import Method
from .matching import squeeze


class DTPS(Method):
    """Prune and squeeze patches in front of some layers, each with its own predictor.

    `.eval()` keeps the patches of highest score. `.train()` draws which patches to keep, and no token leaves: a mask
    hides the pruned tokens from attention and gives the predictors a gradient. The choice of hosts has no gradient.
    """

    config_class = DTPSConfig
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
            initialize_randomly(embedding, std, seed=0)  # the same attach gives the same outputs

    def metric_cost(self) -> MetricCost:
        width, prefix = self.geometry.hidden_size, self.geometry.num_prefix_tokens
        per_token = sum(inner * outer for inner, outer in predictor_widths(width).values())
        return MetricCost(per_token, per_image=-prefix * per_token, width=width, compared="leaving")

    def reduce(self, x: Tensor, normed: Tensor, layer: Any, state: TokenState, bias: Tensor | None) -> Tensor:
        index, prefix, num_tokens = state.layer, state.num_prefix_tokens, x.shape[1]
        _, r = state.begin_layer(index, num_tokens)
        if r == 0:
            state.record_unchanged(index, x)
            return x
        assert state.embedding is not None
        counted, before = state.kept_before(index), state.sizes(index)
        empty = state.padding(index) if counted is None else None
        before = torch.ones(x.shape[:2], device=x.device) if before is None else before
        if counted is None:
            counted = torch.ones_like(before) if empty is None else (~empty).float()
        counted = counted.to(x.device)[:, prefix:]
        predictor = state.embedding.predictors[self._layers.index(index + 1)]
        log_probabilities = predictor(x[:, prefix:], counted)
        if self.masks_tokens(layer.training):
            return self._mask(x, ops.draw_kept(log_probabilities, counted), counted > 0.5, before.detach(), state)
        scores = log_probabilities[..., 0]
        if empty is not None:
            scores = scores.masked_fill(empty[:, prefix:], -torch.inf)
        kept, pruned = ops.split_by_score(F.pad(scores, [prefix, 0]), num_tokens - prefix - r, prefix)
        return squeeze(x, before, kept, pruned, state, empty)

    def _mask(self, x: Tensor, kept: Tensor, earlier: Tensor, before: Tensor, state: TokenState) -> Tensor:
        """Squeeze the patches that this layer prunes into their hosts: x [B, n, D], sizes `before` [B, n].

        `kept` [B, n - P], 1 or 0 with a gradient, are the patches that stay; bool `earlier` [B, n - P] are the patches
        that were kept so far.
        """
        prefix = state.num_prefix_tokens
        stays = F.pad(kept.detach() > 0.5, [prefix, 0])
        pruned = F.pad(earlier, [prefix, 0]) & ~stays
        host, weights = ops.squeeze_in_place(x, stays, pruned)
        squeezed, _ = ops.join_in_place(x, weights, host, pruned)
        _, sizes = ops.join_in_place(before.unsqueeze(-1), before, host, pruned)
        kept = F.pad(kept, [prefix, 0], value=1.0)
        state.record_merge(
            state.layer,
            squeezed,
            sizes * kept,
            x.shape[1],
            source=lambda: torch.where(pruned, host, torch.arange(x.shape[1], device=x.device)),
            carry=lambda positions: ops.join_in_place(positions, before, host, pruned)[0],
            kept=kept,
        )
        return squeezed

    def masks_tokens(self, training: bool) -> bool:
        return training

    def sizes_carry_gradient(self, training: bool) -> bool:
        return training

    def loss_term(self, state: TokenState) -> Tensor | None:
        """2 · mean (ρˢ - kept share)², over stages s and images."""
        if not state.kept:
            return None
        prefix, sizes = state.num_prefix_tokens, state.sizes(0)
        misses = []
        for layer, kept in state.kept.items():
            patches = kept.shape[1] - prefix if sizes is None else sizes[:, prefix:].sum(dim=1).to(kept.device)
            share = kept[:, prefix:].sum(dim=1) / patches
            misses.append(self.config.keep_rate ** (self._layers.index(layer) + 1) - share)
        return 2 * torch.stack([miss.to(misses[0].device) for miss in misses]).square().mean()
