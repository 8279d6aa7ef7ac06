"""Matching and merging in one step, by whatever is fastest for the tensors at hand."""

import torch
from torch import Tensor

from .matching import bipartite_soft_matching
from .merging import Merged, merge_tokens


def add_heads(metric: Tensor, heads: int) -> Tensor:
    """The sum of a metric's heads, which points where their mean does: [B, N, H · d] -> [B, N, d], float32."""
    return metric if heads == 1 else metric.unflatten(-1, (heads, -1)).sum(dim=-2, dtype=torch.float32)


def match_and_merge(
    x: Tensor,
    sizes: Tensor | None,
    metric: Tensor,
    r: int,
    num_prefix_tokens: int = 1,
    empty: Tensor | None = None,
    heads: int = 1,
) -> Merged:
    """`bipartite_soft_matching` by a metric [B, N, H · d], whose heads are added up, and `merge_tokens` along it.

    x [B, N, D], sizes [B, N] or None -> x [B, N - r, D], sizes [B, N - r], and what makes the matching.
    """
    matching = bipartite_soft_matching(add_heads(metric, heads), r, num_prefix_tokens, empty)
    return Merged(*merge_tokens(x, sizes, matching), lambda: matching)
