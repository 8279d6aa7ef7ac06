"""The base class of methods that rank patches by the attention of the CLS token."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..costs import MetricCost
from ..errors import UnsupportedModelError
from ..token_state import TokenState
from .base import Method


class RankingMethod(Method):
    """Rank by CLS attention, from the layer's queries and keys. Nothing is learned; training does the same."""

    pairwise: ClassVar[bool] = False

    def check(self, encoder_name: str) -> None:
        if self.geometry.num_prefix_tokens == 0:
            raise UnsupportedModelError(
                f"method={self.config.method!r} ranks tokens by the attention of a CLS token, and {encoder_name} has "
                "none; use 'tome' or 'dtem'."
            )

    def metric_cost(self) -> MetricCost:
        width = self.geometry.num_heads * self.geometry.head_dim
        # Project one query, and multiply it with the keys; attention computes the keys anyway.
        return MetricCost(width, per_image=width * self.geometry.hidden_size)

    def reduce(self, x: Tensor, normed: Tensor, layer: Any, state: TokenState, bias: Tensor | None) -> Tensor:
        index = state.layer
        _, r = state.begin_layer(index, x.shape[1])
        if r == 0:
            state.record_unchanged(index, x)
            return x
        before = state.sizes(index)
        before = torch.ones(x.shape[:2], device=x.device) if before is None else before
        return self.shorten(x, before, layer.first_token_attention(normed, bias, state), r, state)

    @abstractmethod
    def shorten(self, x: Tensor, sizes: Tensor, scores: Tensor, r: int, state: TokenState) -> Tensor:
        """Remove r tokens by their scores [B, n] and record it: x [B, n, D], sizes [B, n] -> [B, n - r, D]."""
