"""Size-weighted merging along a matching, source maps, and the way back (METHOD.md section 3)."""

import torch
from torch import Tensor

from . import kernels
from .forms import exports_one_hot
from .matching import Matching, split_counts, split_even_odd


_SMALLEST_TOTAL = 1e-12


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of each image: [B, N, D], [B, n] -> [B, n, D]."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _add_rows(base: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """Add each row to the base row it points at: [B, b, D], [B, r], [B, r, D] -> [B, b, D].

    CUDA scatters by atomics in no fixed order, and the same input must give the same output: there, the sum is a
    product with the one-hot matrix of the index.
    """
    if base.is_cuda or exports_one_hot():
        positions = torch.arange(base.shape[1], device=base.device).unsqueeze(-1)
        return torch.baddbmm(base, (positions == index.unsqueeze(1)).to(base.dtype), rows)  # [B, b, r] @ [B, r, D]
    return base.scatter_add(1, index.unsqueeze(-1).expand_as(rows), rows)


def merge_tokens(x: Tensor, sizes: Tensor | None, matching: Matching) -> tuple[Tensor, Tensor]:
    """Merge the matched tokens: size-weighted mean of features, sum of sizes (METHOD.md section 3).

    `x` [B, N, D], `sizes` [B, N] float32 or None where every token stands for one patch. Returns x [B, N - r, D] in
    its own dtype and sizes [B, N - r] float32, in the order prefix, unmerged A, B. The sums run in float32. Tokens
    that nobody joined are copied, bit for bit.
    """
    if kernels.can_merge(x, sizes):
        return kernels.merge_tokens(x, sizes, *matching)
    prefix = matching.num_prefix_tokens
    if sizes is None:
        sizes = torch.ones(x.shape[:2], dtype=torch.float32, device=x.device)
    a, b = split_even_odd(x, prefix)
    size_a, size_b = split_even_odd(sizes, prefix)

    leaving_size = size_a.gather(1, matching.merged)
    with torch.autocast(x.device.type, enabled=False):
        leaving = _take(a, matching.merged).float() * leaving_size.unsqueeze(-1)
        total = _add_rows(b.float() * size_b.unsqueeze(-1), matching.target, leaving)
        new_size_b = _add_rows(size_b.unsqueeze(-1), matching.target, leaving_size.unsqueeze(-1)).squeeze(-1)
        # A hard merge behind a soft one meets tokens of no size at all.
        mean = (total / new_size_b.clamp(min=_SMALLEST_TOTAL).unsqueeze(-1)).to(x.dtype)
    merged_b = torch.where((new_size_b == size_b).unsqueeze(-1), b, mean)

    x = torch.cat([x[:, :prefix], _take(a, matching.kept), merged_b], dim=1)
    sizes = torch.cat([sizes[:, :prefix], size_a.gather(1, matching.kept), new_size_b], dim=1)
    return x, sizes


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
    return _take(x, source)
