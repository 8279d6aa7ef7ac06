"""EViT: the patches that the CLS token attends to least are fused into one token (METHOD.md section 7)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .. import ops
from ..configuration import EViTConfig
from ..errors import UnsupportedModelError
from ..schedule import MetricCost
from ..token_state import TokenState
from .base import MergedLayer, Method


class EViT(Method[EViTConfig]):
    """Nothing to learn; the same in training. The scores are the layer's own queries and keys."""

    config_class: ClassVar[type[EViTConfig]] = EViTConfig
    pairwise: ClassVar[bool] = False

    def check(self, encoder_name: str) -> None:
        if self.geometry.num_prefix_tokens == 0:
            raise UnsupportedModelError(
                f"method='evit' ranks tokens by the attention of a CLS token, and {encoder_name} has none; "
                "use 'tome' or 'dtem'."
            )

    def metric_cost(self) -> MetricCost:
        width = self.geometry.num_heads * self.geometry.head_dim
        # The products of keys, which attention has computed, with one query, and that query.
        return MetricCost(width, per_image=width * self.geometry.hidden_size)

    def reduce(self, x: Tensor, normed: Tensor, layer: MergedLayer, state: TokenState, bias: Tensor | None) -> Tensor:
        index, num_tokens, prefix = state.layer, x.shape[1], state.num_prefix_tokens
        active, r = state.begin_layer(index, num_tokens)
        if r == 0:
            state.record_unchanged(index, x)
            return x
        scores = layer.first_token_attention(normed, bias, state)
        kept, fused = ops.split_by_score(scores, num_tokens - prefix - r - 1, prefix)
        before = state.sizes(index)
        before = torch.ones(x.shape[:2], device=x.device) if before is None else before
        x, sizes = ops.fuse_tokens(x, before, scores, kept, fused, prefix)

        def carry(positions: Tensor) -> Tensor:  # the fused patches' mean place, whatever attention weighs them by
            shares = before / before.gather(1, fused).sum(dim=1, keepdim=True)
            return ops.fuse_tokens(positions, before, shares, kept, fused, prefix)[0]

        state.record_merge(
            index, x, sizes, active - r, source=lambda: ops.fused_source_map(kept, num_tokens, prefix), carry=carry
        )
        return x
