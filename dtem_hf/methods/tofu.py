"""ToFu: ToMe's matching; early layers prune, late layers merge and restore the length (docs/method.md section 9)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..configuration import ToFuConfig
from ..token_state import TokenState
from .matching import KeyMatchingMethod, record_matched


class ToFu(KeyMatchingMethod):
    """A pruned token's features are dropped; its size goes to its partner, which stands for both from then on."""

    config_class = ToFuConfig

    def prunes(self, layer: int) -> bool:
        """Whether a layer prunes; else it merges."""
        first = self.config.prune_layers
        return layer < (self.geometry.num_layers // 2 if first is None else first)

    def merge(self, x: Tensor, metric: Tensor, r: int, training: bool, state: TokenState) -> Tensor:
        index, before, empty = state.layer, state.sizes(state.layer), state.padding(state.layer)
        matching = ops.bipartite_soft_matching(metric, r, state.num_prefix_tokens, empty)
        if self.prunes(index):
            ones = x.new_ones(x.shape[:2], dtype=torch.float32)
            merged, sizes = ops.prune_tokens(x, ones if before is None else before, matching)
        else:
            merged, sizes = ops.merge_tokens(x, before, matching)
            merged = ops.restore_lengths(merged, x, ops.source_map(matching, x.shape[1]), empty)
        record_matched(state, merged, sizes, matching)
        return merged
