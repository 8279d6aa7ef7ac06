"""Size-weighted merging along a matching, source maps, and the way back (METHOD.md section 3)."""

import torch
from torch import Tensor

from . import kernels
from .forms import exports_one_hot
from .hosts import Hosts
from .matching import Matching
from .splitting import split_counts, split_even_odd


_SMALLEST_TOTAL = 1e-12


def _add_at(base: Tensor, index: Tensor, rows: Tensor, flat_index: Tensor) -> Tensor:
    """Add each row to the base row at its index: [B, n, D], [B, r], [B, r, D] -> [B, n, D]. May overwrite `base`."""
    exporting = torch.compiler.is_exporting()
    if base.is_cuda or (exporting and exports_one_hot()):
        # A product with the one-hot matrix: CUDA scatters by atomics in no fixed order, and TensorRT cannot.
        positions = torch.arange(base.shape[1], device=base.device).unsqueeze(-1)
        one_hot = (positions == index.unsqueeze(1)).to(base.dtype)
        with torch.autocast(base.device.type, enabled=False):
            return torch.baddbmm(base, one_hot, rows)  # [B, n, r] @ [B, r, D]
    if exporting:
        return base.scatter_add(1, index.unsqueeze(-1).expand_as(rows), rows)
    return base.flatten(0, 1).index_add_(0, flat_index, rows.flatten(0, 1)).view_as(base)


def merge_tokens(x: Tensor, sizes: Tensor | None, matching: Matching) -> tuple[Tensor, Tensor]:
    """Merge the matched tokens: size-weighted mean of features, sum of sizes (METHOD.md section 3).

    `x` [B, N, D], `sizes` [B, N] float32 or None where every token stands for one patch. Returns x [B, N - r, D] in
    its own dtype and sizes [B, N - r] float32, in the order prefix, unmerged A, B. The sums run in float32 at least.
    Tokens that no other token joined are copied, bit for bit.
    """
    if x.device.type in kernels.devices and kernels.can_merge(x, sizes):
        return kernels.merge_tokens(x, sizes, *matching)
    prefix, (batch, num_tokens, _) = matching.num_prefix_tokens, x.shape
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

    return _merge_at(x, sizes, staying, leaving, joined, joined_rows)


def _merge_at(
    x: Tensor, weights: Tensor, staying: Tensor, leaving: Tensor, joined: Tensor, joined_rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Weighted means [B, n, D] of staying tokens and those that join them, and the sums of their weights [B, n].

    `staying` [B, n] and `leaving` [B · r] are rows of all images below each other; `joined` [B, r] are the places in
    the output that the leaving ones join, `joined_rows` [B · r] the same as rows of all outputs below each other.
    """
    (batch, left), r, width = staying.shape, joined.shape[1], x.shape[-1]
    flat, flat_weights = x.flatten(0, 1), weights.flatten()
    dtype = torch.promote_types(x.dtype, torch.float32)
    merged = flat.index_select(0, staying.flatten()).to(dtype)
    new_weights = flat_weights.index_select(0, staying.flatten()).view(batch, left, 1)
    leaving_weight = flat_weights.index_select(0, leaving).view(batch, r, 1)
    new_weights = _add_at(new_weights, joined, leaving_weight, joined_rows)
    # A mean as a step of its target, so that only targets change: x + Σ mᵢ (xᵢ - x) / m'. After a soft merge, tokens
    # can be empty.
    total = new_weights.view(-1, 1).index_select(0, joined_rows).clamp(min=_SMALLEST_TOTAL)
    steps = (flat.index_select(0, leaving).to(dtype) - merged.index_select(0, joined_rows)) * (
        leaving_weight.view(-1, 1) / total
    )
    merged = _add_at(merged.view(batch, left, width), joined, steps.view(batch, r, width), joined_rows)
    return merged.to(x.dtype), new_weights.squeeze(-1)


def merge_into(x: Tensor, weights: Tensor, hosts: Hosts) -> tuple[Tensor, Tensor]:
    """Merge tokens into their hosts: weighted means of x [B, N, D], sums of the weights [B, N].

    Returns x [B, N - r, D] in its own dtype and weights [B, N - r], in the order that the staying tokens had. Tokens
    that no other token joined are copied, bit for bit.
    """
    (batch, num_tokens, _), left = x.shape, hosts.staying.shape[1]
    first = torch.arange(batch, device=x.device).unsqueeze(1)
    joined = hosts.source.gather(1, hosts.leaving)
    staying, leaving = hosts.staying + first * num_tokens, (hosts.leaving + first * num_tokens).flatten()
    return _merge_at(x, weights, staying, leaving, joined, (joined + first * left).flatten())


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
