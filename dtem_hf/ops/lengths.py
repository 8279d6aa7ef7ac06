"""Lengths of tokens: a mean is shorter than its tokens (docs/method.md section 9, ToFu)."""

import torch
from torch import Tensor

from .matching import Matching
from .merging import merge_tokens


def norms_of(x: Tensor) -> Tensor:
    """Lengths of tokens in float32: [B, n, D] -> [B, n, 1]."""
    # Summed in float32 at least; a float64 model is not narrowed before the sum.
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype).float()


def restore_lengths(merged: Tensor, x: Tensor, source: Tensor, empty: Tensor | None = None) -> Tensor:
    """ToFu's MLERP: scale every merged token to the length of the longest of its tokens; [B, n, D] -> [B, n, D].

    `x` [B, N, D] are the tokens before the merge and `source` [B, N] is its source map. `empty` [B, N] marks padding,
    whose length does not count. Unmerged tokens do not change, bit for bit.
    """
    lengths = norms_of(x).squeeze(-1)
    if empty is not None:
        lengths = lengths.masked_fill(empty, 0.0)
    places = torch.arange(merged.shape[1], device=x.device).unsqueeze(-1)
    longest = lengths.unsqueeze(1).masked_fill(source.unsqueeze(1) != places, 0.0).amax(dim=-1, keepdim=True)
    own = norms_of(merged)
    scale = torch.where((longest > 0) & (own > 0), longest / own.clamp(min=1e-30), 1.0)
    return (merged * scale).to(merged.dtype)


def prune_tokens(x: Tensor, sizes: Tensor, matching: Matching) -> tuple[Tensor, Tensor]:
    """ToFu's pruning: tokens that others join keep their features, bit for bit, and the sizes are added.

    `x` [B, N, D], `sizes` [B, N]. Returns x [B, N - r, D] and sizes [B, N - r], in the order of `merge_tokens`.
    """
    weights = torch.ones_like(sizes).scatter(1, matching.leaving, 0.0)
    return merge_tokens(x, weights, matching)[0], merge_tokens(sizes.unsqueeze(-1), sizes, matching)[1]
