"""Size-weighted merging along a matching, source maps, and the way back (METHOD.md section 3)."""

import torch
from torch import Tensor

from . import kernels
from .forms import exports_one_hot
from .matching import Matching
from .splitting import split_counts, split_even_odd


_SMALLEST_TOTAL = 1e-12


def _add_at(base: Tensor, index: Tensor, rows: Tensor, flat_index: Tensor) -> Tensor:
    """Add each row to the base row at its index: [B, n, D], [B, r], [B, r, D] -> [B, n, D]. May overwrite `base`."""
    if base.is_cuda or exports_one_hot():
        # A product with the one-hot matrix: CUDA scatters by atomics in no fixed order, and TensorRT cannot.
        positions = torch.arange(base.shape[1], device=base.device).unsqueeze(-1)
        one_hot = (positions == index.unsqueeze(1)).to(base.dtype)
        with torch.autocast(base.device.type, enabled=False):
            return torch.baddbmm(base, one_hot, rows)  # [B, n, r] @ [B, r, D]
    return base.flatten(0, 1).index_add_(0, flat_index, rows.flatten(0, 1)).view_as(base)


def merge_tokens(x: Tensor, sizes: Tensor | None, matching: Matching) -> tuple[Tensor, Tensor]:
    """Merge the matched tokens: size-weighted mean of features, sum of sizes (METHOD.md section 3).

    `x` [B, N, D], `sizes` [B, N] float32 or None where every token stands for one patch. Returns x [B, N - r, D] in
    its own dtype and sizes [B, N - r] float32, in the order prefix, unmerged A, B. The sums run in float32 at least.
    Tokens that no other token joined are copied, bit for bit.
    """
    if x.device.type in kernels.devices and kernels.can_merge(x, sizes):
        return kernels.merge_tokens(x, sizes, *matching)
    if torch.compiler.is_exporting():
        return _merge_in_graph(x, sizes, matching)
    prefix, (batch, num_tokens, width) = matching.num_prefix_tokens, x.shape
    (r, kept), device = (matching.merged.shape[1], matching.kept.shape[1]), x.device
    first_a, first_b, left = prefix + prefix % 2, prefix + 1 - prefix % 2, num_tokens - r
    if sizes is None:
        sizes = torch.ones(batch, num_tokens, dtype=torch.float32, device=device)
    # Rows of all images below each other: a gather along tokens would read its index anew for every feature.
    rows = torch.arange(batch * num_tokens, device=device).view(batch, num_tokens)
    first = rows[:, first_a : first_a + 1]
    staying = torch.cat([rows[:, :prefix], torch.add(first, matching.kept, alpha=2), rows[:, first_b::2]], dim=1)
    leaving = torch.add(first, matching.merged, alpha=2).flatten()
    joined = matching.target + (prefix + kept)  # places in the output, where B follows the prefix and unmerged A
    joined_rows = (joined + torch.arange(0, batch * left, left, device=device).unsqueeze(1)).flatten()

    flat, flat_sizes = x.flatten(0, 1), sizes.flatten()
    dtype = torch.promote_types(x.dtype, torch.float32)
    merged = flat.index_select(0, staying.flatten()).to(dtype)
    new_sizes = flat_sizes.index_select(0, staying.flatten()).view(batch, left, 1)
    leaving_size = flat_sizes.index_select(0, leaving).view(batch, r, 1)
    new_sizes = _add_at(new_sizes, joined, leaving_size, joined_rows)
    # A mean as a step of its target, so that only targets change: x + Σ mᵢ (xᵢ - x) / m'. After a soft merge, tokens
    # can be empty.
    total = new_sizes.view(-1, 1).index_select(0, joined_rows).clamp(min=_SMALLEST_TOTAL)
    steps = (flat.index_select(0, leaving).to(dtype) - merged.index_select(0, joined_rows)) * (
        leaving_size.view(-1, 1) / total
    )
    merged = _add_at(merged.view(batch, left, width), joined, steps.view(batch, r, width), joined_rows)
    return merged.to(x.dtype), new_sizes.squeeze(-1)


def _merge_in_graph(x: Tensor, sizes: Tensor | None, matching: Matching) -> tuple[Tensor, Tensor]:
    """`merge_tokens` in few operations, of which only the rows of a batch depend on the batch."""
    merged, target, kept, prefix = matching
    (batch, num_tokens, width), device = x.shape, x.device
    r, left = merged.shape[1], num_tokens - merged.shape[1]
    first_a, first_b = prefix + prefix % 2, prefix + 1 - prefix % 2
    images = torch.arange(batch, device=device).unsqueeze(1)
    start = images * num_tokens
    before, b = (torch.arange(*span, device=device) for span in ((0, prefix), (first_b, num_tokens, 2)))
    staying = torch.cat([start + before, start + (first_a + 2 * kept), start + b], dim=1).flatten()
    leaving = (start + (first_a + 2 * merged)).flatten()
    joined = target + (prefix + kept.shape[1])
    joined_rows = (images * left + joined).flatten()

    flat = x.flatten(0, 1)
    dtype = torch.promote_types(x.dtype, torch.float32)
    new = flat.index_select(0, staying).to(dtype)
    if sizes is None:
        sizes = torch.ones(batch, num_tokens, dtype=torch.float32, device=device)
    leaving_size = sizes.flatten().index_select(0, leaving).view(batch, r)
    new_sizes = sizes.flatten().index_select(0, staying).view(batch, left)
    if exports_one_hot():
        new_sizes = _add_at(new_sizes.unsqueeze(-1), joined, leaving_size.unsqueeze(-1), joined_rows).squeeze(-1)
    else:
        new_sizes = new_sizes.scatter_add(1, joined, leaving_size)
    share = leaving_size / new_sizes.gather(1, joined).clamp(min=_SMALLEST_TOTAL)
    steps = (flat.index_select(0, leaving).to(dtype) - new.index_select(0, joined_rows)) * share.view(-1, 1)
    if exports_one_hot():
        new = _add_at(new.view(batch, left, width), joined, steps.view(batch, r, width), joined_rows)
    else:
        new = new.index_put((joined_rows,), steps, accumulate=True).view(batch, left, width)
    return new.to(x.dtype), new_sizes


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
    first = torch.arange(0, x.shape[0] * x.shape[1], x.shape[1], device=source.device)
    rows = (source + first.unsqueeze(1)).flatten()
    return x.flatten(0, 1).index_select(0, rows).view(*source.shape, -1)
