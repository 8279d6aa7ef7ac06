"""Size-weighted merging along a matching, source maps, and unmerging (docs/method.md section 3)."""

import torch
from torch import Tensor

from . import kernels
from .autocast import without_autocast
from .forms import exports, is_exporting
from .matching import Matching


_SMALLEST_TOTAL = 1e-12


def _flat_index(positions: Tensor, num_tokens: int) -> Tensor:
    """Positions [B, k] as indices into the flattened batch [B · num_tokens]: [B · k]."""
    first = torch.arange(0, positions.shape[0] * num_tokens, num_tokens, device=positions.device)
    return (positions + first.unsqueeze(1)).flatten()


def _add_at(base: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """Add at each index: [B, n, D], [B, r], [B, r, D] -> [B, n, D], or [B, n], [B, r], [B, r] -> [B, n].

    May overwrite `base`.
    """
    if base.is_cuda or (is_exporting() and exports("one_hot")):
        # A product with the one-hot matrix: CUDA's scatter adds in no fixed order, and TensorRT has no such scatter.
        positions = torch.arange(base.shape[1], device=base.device).unsqueeze(-1)
        one_hot = (positions == index.unsqueeze(1)).to(base.dtype)
        with without_autocast(base.device.type):
            if base.dim() == 2:
                return torch.baddbmm(base.unsqueeze(-1), one_hot, rows.unsqueeze(-1)).squeeze(-1)
            return torch.baddbmm(base, one_hot, rows)  # [B, n, r] @ [B, r, D]
    if base.dim() == 2:
        return base.scatter_add(1, index, rows)
    if index.shape[0] == 1 and not torch.compiler.is_compiling():  # a compiled graph may run with any batch size
        return base.index_add_(1, index[0], rows)
    # On the flattened batch: a scatter along tokens would read the index anew for every feature.
    flat, index, rows = base.flatten(0, 1), _flat_index(index, base.shape[1]), rows.flatten(0, 1)
    if is_exporting():
        return flat.index_put((index,), rows, accumulate=True).view_as(base)
    return flat.index_add_(0, index, rows).view_as(base)


def merge_tokens(x: Tensor, sizes: Tensor | None, matching: Matching) -> tuple[Tensor, Tensor]:
    """Merge the matched tokens: size-weighted mean of features, sum of sizes (docs/method.md section 3).

    `x` [B, N, D], `sizes` [B, N] float32, or None if every token stands for one patch. Returns x [B, N - r, D] in its
    own dtype and sizes [B, N - r] float32, in the order of `matching.staying`. The sums run in float32 or wider.
    Tokens that no other token joins are copied, bit for bit.
    """
    if x.device.type in kernels.devices and kernels.can_merge(x, sizes):
        return kernels.merge_tokens(x, sizes, *matching)
    leaving, joined, staying = matching
    if sizes is None:
        sizes = torch.ones(x.shape[:2], dtype=torch.float32, device=x.device)
    leaving_sizes = sizes.gather(1, leaving)
    new_sizes = _add_at(sizes.gather(1, staying), joined, leaving_sizes)
    # Each mean is its target plus a step, x + Σ mᵢ (xᵢ - x) / m', so that only targets change. Padding has size 0.
    shares = leaving_sizes / new_sizes.gather(1, joined).clamp(min=_SMALLEST_TOTAL)
    dtype = torch.promote_types(x.dtype, torch.float32)
    merged = take_tokens(x, staying).to(dtype)
    steps = (take_tokens(x, leaving).to(dtype) - take_tokens(merged, joined)) * shares.unsqueeze(-1)
    return _add_at(merged, joined, steps).to(x.dtype), new_sizes


def join_in_place(x: Tensor, weights: Tensor, host: Tensor, leaving: Tensor) -> tuple[Tensor, Tensor]:
    """Merge every `leaving` token into its host, but keep it in its place, unchanged.

    x [B, N, D], weights of the mean [B, N], positions `host` and bool `leaving` [B, N] -> x in its own dtype, and the
    weights; a host's weight is the sum over its tokens. Tokens that no other token joins are copied, bit for bit.
    """
    joining = weights * leaving
    totals = _add_at(weights, host, joining)
    shares = joining / totals.gather(1, host).clamp(min=_SMALLEST_TOTAL)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    steps = (wide - take_tokens(wide, host)) * shares.unsqueeze(-1).to(wide.dtype)
    return _add_at(wide.clone(), host, steps).to(x.dtype), totals


def source_map(matching: Matching, num_tokens: int) -> Tensor:
    """The source map of a matching, from input to output positions: int64 [B, N], values in [0, N - r)."""
    leaving, joined, staying = matching
    outputs = torch.arange(staying.shape[1], device=staying.device).expand_as(staying)
    source = torch.empty(staying.shape[0], num_tokens, dtype=torch.int64, device=staying.device)
    return source.scatter_(1, staying, outputs).scatter_(1, leaving, joined)


def compose_source_maps(earlier: Tensor, later: Tensor) -> Tensor:
    """The source map of two merges in a row: earlier [B, N] into n positions, later [B, n] -> [B, N]."""
    return later.gather(1, earlier)


def take_tokens(x: Tensor, positions: Tensor) -> Tensor:
    """The tokens at given positions: [B, n, D], positions [B, k] -> [B, k, D]."""
    if positions.shape[0] == 1 and not torch.compiler.is_compiling():
        return x.index_select(1, positions[0])
    rows = x.flatten(0, 1).index_select(0, _flat_index(positions, x.shape[1]))
    return rows.view(*positions.shape, x.shape[2])


def unmerge_tokens(x: Tensor, source: Tensor) -> Tensor:
    """Give every original position the token that it was merged into: [B, n, D], source [B, N] -> [B, N, D]."""
    return take_tokens(x, source)
