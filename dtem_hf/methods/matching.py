"""Base classes of methods that merge r pairs of tokens per layer, by any metric or by keys; and TPS's squeezing."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import ops
from ..costs import MetricCost
from ..token_state import MergeStep, TokenState
from .base import Method


class MatchingMethod(Method):
    """Hard bipartite soft matching. A subclass defines the metric."""

    merges_halves: ClassVar[bool] = True

    @abstractmethod
    def metric(self, normed: Tensor, layer: Any, state: TokenState) -> Tensor:
        """The features to compare tokens by: [B, n, D] -> [B, n, d]."""

    def reduce(self, x: Tensor, normed: Tensor, layer: Any, state: TokenState, bias: Tensor | None) -> Tensor:
        index = state.layer
        _, r = state.begin_layer(index, x.shape[1])
        if r == 0:
            state.record_unchanged(index, x)
            return x
        metric = self.metric(normed, layer, state)
        if state.steps is not None:
            x = x if x.requires_grad else x.detach().requires_grad_()
            keys = layer.keys(normed.detach(), state).detach().mean(dim=-2)
            state.steps.append(MergeStep(x, state.sizes(index), metric, keys, state.padding(index), r))
        return self.merge(x, metric, r, layer.training, state)

    def merge(self, x: Tensor, metric: Tensor, r: int, training: bool, state: TokenState) -> Tensor:
        """Merge r tokens of the running layer by a metric: x [B, n, D], metric [B, n, d] -> [B, n - r, D]."""
        index, prefix = state.layer, state.num_prefix_tokens
        before = state.sizes(index)
        matching = ops.bipartite_soft_matching(metric, r, prefix, state.padding(index))
        merged, sizes = ops.merge_tokens(x, before, matching)
        if state.embedding is not None:
            merged = state.embedding.lengthen(
                index, merged, lambda: ops.merge_tokens(ops.norms_of(x), before, matching)[0]
            )
        record_matched(state, merged, sizes, matching)
        return merged


class KeyMatchingMethod(MatchingMethod):
    """Compare tokens by their attention keys, averaged over heads. Nothing is learned; training merges hard, too."""

    def metric_cost(self) -> MetricCost:
        return MetricCost(0, width=self.geometry.head_dim)  # attention computes the keys anyway

    def metric(self, normed: Tensor, layer: Any, state: TokenState) -> Tensor:
        keys = layer.keys(normed, state).detach()
        # The sum has the direction of the mean, and the cosine needs only that.
        if ops.is_exporting() and ops.exports("openvino"):
            first, *others = keys.float().unbind(-2)
            return sum(others, start=first)
        return keys.sum(dim=-2, dtype=torch.float32)


def squeeze(
    x: Tensor, sizes: Tensor, kept: Tensor, pruned: Tensor, state: TokenState, empty: Tensor | None = None
) -> Tensor:
    """TPS: pruned tokens join the most similar kept tokens: x [B, n, D], sizes [B, n] -> [B, n - r, D]."""
    matching, weights = ops.match_pruned_to_kept(x, kept, pruned, empty)
    squeezed, _ = ops.merge_tokens(x, weights, matching)
    _, new_sizes = ops.merge_tokens(sizes.unsqueeze(-1), sizes, matching)
    record_matched(state, squeezed, new_sizes, matching)
    return squeezed


def record_matched(state: TokenState, x: Tensor, sizes: Tensor, matching: ops.Matching) -> None:
    """Record the running layer's output after a merge along a matching: x [B, n', D], sizes [B, n']."""
    before, num_tokens = state.sizes(state.layer), x.shape[1] + matching.leaving.shape[1]
    state.record_merge(
        state.layer,
        x,
        sizes,
        x.shape[1],
        source=lambda: ops.source_map(matching, num_tokens),
        carry=lambda positions: ops.merge_tokens(positions, before, matching)[0],
    )
