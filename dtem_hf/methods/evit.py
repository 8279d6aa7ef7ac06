"""EViT: fuse the patches with little CLS attention into one token (docs/method.md section 7)."""

from __future__ import annotations

from torch import Tensor

from .. import ops
from ..configuration import EViTConfig
from ..token_state import TokenState
from .ranking import RankingMethod


class EViT(RankingMethod):
    """The fused token is the sum of the patches that are not kept, weighted by CLS attention."""

    config_class = EViTConfig

    def shorten(self, x: Tensor, sizes: Tensor, scores: Tensor, r: int, state: TokenState) -> Tensor:
        num_tokens, prefix = x.shape[1], state.num_prefix_tokens
        kept, fused = ops.split_by_score(scores, num_tokens - prefix - r - 1, prefix)
        x, new_sizes = ops.fuse_tokens(x, sizes, scores, kept, fused, prefix)

        def carry(positions: Tensor) -> Tensor:  # the mean position of the fused patches, weighted by size
            shares = sizes / sizes.gather(1, fused).sum(dim=1, keepdim=True)
            return ops.fuse_tokens(positions, sizes, shares, kept, fused, prefix)[0]

        state.record_merge(
            state.layer,
            x,
            new_sizes,
            x.shape[1],
            source=lambda: ops.fused_source_map(kept, num_tokens, prefix),
            carry=carry,
        )
        return x
