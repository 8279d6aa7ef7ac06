"""EViT: the patches that the CLS token attends to least are fused into one token (METHOD.md section 7)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from .. import ops
from ..configuration import EViTConfig
from ..embedding import DecoupledEmbedding
from ..errors import UnsupportedModelError
from ..schedule import MetricCost
from ..token_state import TokenState
from .base import AttentionInputs, Reducer


class EViTReducer(Reducer[EViTConfig]):
    """Nothing to learn; the same in training. CLS attention is computed anew from the layer's own queries and keys."""

    config_class: ClassVar[type[EViTConfig]] = EViTConfig
    pairwise: ClassVar[bool] = False
    runs_in_every_layer = False

    def check(self, encoder: nn.Module) -> None:
        if self.backbone.num_prefix_tokens(encoder) == 0:
            raise UnsupportedModelError(
                f"method='evit' ranks tokens by the attention of a CLS token, and {type(encoder).__name__} has none; "
                "use 'tome' or 'dtem'."
            )

    def initialize(self, embedding: DecoupledEmbedding, encoder: nn.Module) -> None:
        """There is nothing to fill."""

    def metric_cost(self, encoder: nn.Module, layer: nn.Module) -> MetricCost:
        width, hidden = self.backbone.key_projection(layer).weight.shape
        keys = 0 if self.backbone.hands_out_keys(layer) else width * hidden
        # Keys, their products with one query, and that query.
        return MetricCost(keys + width, per_image=width * hidden)

    def reduce(
        self, x: Tensor, normed: Tensor, layer: nn.Module, index: int, state: TokenState, attention: AttentionInputs
    ) -> Tensor:
        active, r = state.enter(index, x.shape[1])
        if r == 0:
            state.pass_on(index, x)
            return x
        num_kept = x.shape[1] - state.num_prefix_tokens - r - 1
        scores = self.backbone.first_token_attention(layer, normed, attention)
        kept, fused = ops.split_by_score(scores, num_kept, state.num_prefix_tokens)
        before = state.sizes(index)
        before = torch.ones(x.shape[:2], device=x.device) if before is None else before
        num_tokens = x.shape[1]
        x, sizes = ops.fuse_tokens(x, before, scores, kept, fused, state.num_prefix_tokens)

        def carry(positions: Tensor) -> Tensor:  # where they lie on average, not where they are looked at
            shares = before / before.gather(1, fused).sum(dim=1, keepdim=True)
            return ops.fuse_tokens(positions, before, shares, kept, fused, state.num_prefix_tokens)[0]

        state.leave(
            index,
            x,
            sizes,
            active - r,
            source=lambda: ops.fused_source_map(kept, num_tokens, state.num_prefix_tokens),
            carry=carry,
        )
        return x
