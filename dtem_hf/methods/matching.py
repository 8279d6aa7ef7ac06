"""What ToMe and DTEM share: merge r tokens per layer by bipartite soft matching on some metric."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn

from .. import ops
from ..configuration import MatchingConfig
from ..embedding import norms_of
from ..token_state import MergeStep, TokenState
from .base import AttentionInputs, Reducer


M = TypeVar("M", bound=MatchingConfig)


class MatchingReducer(Reducer[M]):
    """Hard bipartite soft matching; a subclass says by which metric."""

    runs_in_every_layer = False

    @abstractmethod
    def metric(
        self, normed: Tensor, layer: nn.Module, index: int, state: TokenState, attention: AttentionInputs
    ) -> tuple[Tensor, int]:
        """What tokens are compared by, and how many heads of it are added up: [B, n, D] -> [B, n, H · d], H."""

    def reduce(
        self, x: Tensor, normed: Tensor, layer: nn.Module, index: int, state: TokenState, attention: AttentionInputs
    ) -> Tensor:
        _, r = state.enter(index, x.shape[1])
        if r == 0:
            state.pass_on(index, x)
            return x
        metric, heads = self.metric(normed, layer, index, state, attention)
        if state.steps is not None:
            x = x if x.requires_grad else x.detach().requires_grad_()
            keys = self.backbone.mean_keys(layer, normed.detach())
            state.steps.append(
                MergeStep(x, state.sizes(index), ops.add_heads(metric, heads), keys, state.padding(index), r)
            )
        return self.merge(x, metric, heads, r, layer, index, state)

    def merge(
        self, x: Tensor, metric: Tensor, heads: int, r: int, layer: nn.Module, index: int, state: TokenState
    ) -> Tensor:
        """Merge r tokens of layer `index` by a metric: x [B, n, D], metric [B, n, H · d] -> [B, n - r, D]."""
        before, padding = state.sizes(index), state.padding(index)
        merged = ops.match_and_merge(x, before, metric, r, state.num_prefix_tokens, padding, heads)
        lengthened = lengthen(
            state, index, merged.x, lambda: ops.merge_tokens(norms_of(x), before, merged.matching())[0]
        )
        leave_matched(state, index, merged._replace(x=lengthened), x.shape[1])
        return lengthened


def lengthen(state: TokenState, index: int, x: Tensor, norms: Callable[[], Tensor]) -> Tensor:
    """Give merged tokens [B, n, D] back what layer `index` says of their length; `norms` merges lengths as them."""
    return x if state.embedding is None else state.embedding.lengthen(index, x, norms)


def leave_matched(state: TokenState, index: int, merged: ops.Merged, num_tokens: int) -> None:
    """Record what a matching left of `num_tokens` tokens."""
    before = state.sizes(index)
    state.leave(
        index,
        merged.x,
        merged.sizes,
        merged.x.shape[1],
        source=lambda: ops.source_map(merged.matching(), num_tokens),
        carry=lambda positions: ops.merge_tokens(positions, before, merged.matching())[0],
        bias=merged.bias,
    )
