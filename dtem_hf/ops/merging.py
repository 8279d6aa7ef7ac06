"""Size-weighted merging along a matching, source maps, and the way back (METHOD.md section 3)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import kernels
from .forms import exports_one_hot
from .matching import Matching, split_counts, split_even_odd, without_autocast


_SMALLEST_TOTAL = 1e-12


class Merged(NamedTuple):
    """Tokens behind a merge: `x` [B, N - r, D], `sizes` [B, N - r], and `matching`, which makes what they went by.

    `bias` [B, 1, 1, N - r] is the float32 `size_bias` of the sizes, where it was made in passing.
    """

    x: Tensor
    sizes: Tensor
    matching: Callable[[], Matching]
    bias: Tensor | None = None


def _rows(index: Tensor, num_tokens: int, first: int = 0, step: int = 1) -> Tensor:
    """Where positions in each image are in all images below each other: [B, n] -> [B · n].

    An index i stands for position `first` + i · `step`. A gather along tokens would read its index anew for every
    feature, and take ten times as long on a CPU.
    """
    batch = index.shape[0]
    images = torch.arange(first, first + batch * num_tokens, num_tokens, device=index.device).unsqueeze(1)
    return torch.add(images, index, alpha=step).flatten()


def _add_sizes(base: Tensor, index: Tensor, sizes: Tensor) -> Tensor:
    """Add each size to the one it points at: [B, b], [B, r], [B, r] -> [B, b]."""
    if base.is_cuda or exports_one_hot():
        return _add_by_product(base.unsqueeze(-1), index, sizes.unsqueeze(-1)).squeeze(-1)
    return base.scatter_add(1, index, sizes)


def _add_rows(base: Tensor, index: Tensor, rows: Tensor, flat_index: Tensor) -> Tensor:
    """Add each row to the base row it points at: [B, b, D], [B, r], [B, r, D] -> [B, b, D]. Overwrites `base`."""
    if base.is_cuda or exports_one_hot():
        return _add_by_product(base, index, rows)
    if torch.compiler.is_exporting():
        return base.scatter_add(1, index.unsqueeze(-1).expand_as(rows), rows)
    base.flatten(0, 1).index_add_(0, flat_index, rows.flatten(0, 1))
    return base


def _add_by_product(base: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """The same as a product with the one-hot matrix of the index.

    CUDA scatters by atomics in no fixed order, and the same input must give the same output.
    """
    positions = torch.arange(base.shape[1], device=base.device).unsqueeze(-1)
    return torch.baddbmm(base, (positions == index.unsqueeze(1)).to(base.dtype), rows)  # [B, b, r] @ [B, r, D]


def merge_tokens(x: Tensor, sizes: Tensor | None, matching: Matching) -> tuple[Tensor, Tensor]:
    """Merge the matched tokens: size-weighted mean of features, sum of sizes (METHOD.md section 3).

    `x` [B, N, D], `sizes` [B, N] float32 or None where every token stands for one patch. Returns x [B, N - r, D] in
    its own dtype and sizes [B, N - r] float32, in the order prefix, unmerged A, B. The sums run in float32. Tokens
    that nobody joined are copied, bit for bit.
    """
    if kernels.can_merge(x, sizes):
        return kernels.merge_tokens(x, sizes, *matching)
    prefix, target = matching.num_prefix_tokens, matching.target
    if sizes is None:
        sizes = torch.ones(x.shape[:2], dtype=torch.float32, device=x.device)
    _, b = split_even_odd(x, prefix)
    size_a, size_b = split_even_odd(sizes, prefix)
    leaving_size = size_a.gather(1, matching.merged)
    new_size_b = _add_sizes(size_b, target, leaving_size)
    # A mean as what it moves its target by, so that only targets are touched: x + Σ mᵢ (xᵢ - x) / m'. A hard merge
    # behind a soft one meets tokens of no size at all.
    share = leaving_size / new_size_b.gather(1, target).clamp_(min=_SMALLEST_TOTAL)

    # A in its new order, and at the end those that leave.
    rows = torch.cat([matching.kept, matching.merged], dim=1)
    rows = _rows(rows, x.shape[1], first=prefix + prefix % 2, step=2)
    a = x.flatten(0, 1).index_select(0, rows).view(x.shape[0], -1, x.shape[2])
    kept, leaving = a.split_with_sizes([matching.kept.shape[1], target.shape[1]], dim=1)
    merged_b = b.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    joined = _rows(target, b.shape[1])
    with without_autocast(x.device.type):
        steps = leaving.float() - merged_b.flatten(0, 1).index_select(0, joined).view_as(leaving)
        merged_b = _add_rows(merged_b, target, steps * share.unsqueeze(-1), joined).to(x.dtype)
    x = torch.cat([x[:, :prefix], kept, merged_b], dim=1)
    return x, torch.cat([sizes[:, :prefix], size_a.gather(1, matching.kept), new_size_b], dim=1)


def source_map(matching: Matching, num_tokens: int) -> Tensor:
    """The output position every input token ended in: int64 [B, N], values in [0, N - r)."""
    prefix = matching.num_prefix_tokens
    batch, kept = matching.kept.shape
    even, odd = split_counts(num_tokens, prefix)
    device = matching.kept.device
    first_b = prefix + kept
    from_a = torch.empty(batch, even, dtype=torch.int64, device=device)
    from_a.scatter_(1, matching.kept, torch.arange(prefix, first_b, device=device).expand(batch, -1))
    from_a.scatter_(1, matching.merged, first_b + matching.target)
    source = torch.empty(batch, num_tokens, dtype=torch.int64, device=device)
    source[:, :prefix] = torch.arange(prefix, device=device)
    view_a, view_b = split_even_odd(source, prefix)
    view_a.copy_(from_a)
    view_b.copy_(torch.arange(first_b, first_b + odd, device=device).expand(batch, -1))
    return source


def compose_source_maps(earlier: Tensor, later: Tensor) -> Tensor:
    """Follow two merges in a row: earlier [B, N] into n positions, later [B, n] -> [B, N]."""
    return later.gather(1, earlier)


def unmerge_tokens(x: Tensor, source: Tensor) -> Tensor:
    """Give every input token the output token it was merged into: [B, n, D], source [B, N] -> [B, N, D]."""
    return x.flatten(0, 1).index_select(0, _rows(source, x.shape[1])).view(*source.shape, -1)
