"""Matching and merging of a few images on a CPU, in one call of compiled C.

For one image they are a few microseconds of arithmetic, and as tensor operations twenty times as much. Without the
compiled library the plain path runs, which is the reference, and what larger batches, other dtypes and gradients take
anyway. Layers that run as one call (`fused_layer.py`) match and merge in it.
"""

from __future__ import annotations

import ctypes
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from .compiled import library
from .matching import Matching, split_counts
from .merging import Merged
from .recording import DTYPE, is_recorded


# One call runs on one thread: with more images, all threads of the plain path are faster.
_MOST_IMAGES_PER_THREAD = 2
_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_int64
_ARGUMENTS = (
    *(_POINTER, _NUMBER, _NUMBER, _NUMBER, _NUMBER),
    *(_POINTER, _NUMBER, _NUMBER, _NUMBER),
    *(_POINTER, _NUMBER, _NUMBER, _NUMBER, _NUMBER, _NUMBER),
    *(_POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER),
)


def can_match_and_merge(x: Tensor, sizes: Tensor | None, metric: Tensor) -> bool:
    """Whether `match_and_merge` runs on tokens, and is the faster way."""
    return (
        type(x) is Tensor
        and type(metric) is Tensor
        and x.is_cpu
        and metric.is_cpu
        and x.dtype == metric.dtype == DTYPE
        and not is_recorded()
        and x.shape[0] <= _MOST_IMAGES_PER_THREAD * torch.get_num_threads()
        and not (torch.is_grad_enabled() and _any_requires_grad(x, sizes, metric))
        and x.stride(-1) == metric.stride(-1) == 1
        and (sizes is None or (sizes.stride(-1) == 1 and sizes.dtype == DTYPE and sizes.is_cpu))
        and library() is not None
    )


def match_and_merge(
    x: Tensor, sizes: Tensor | None, metric: Tensor, heads: int, r: int, num_prefix_tokens: int
) -> Merged:
    """Match by a metric [B, N, H · d], whose heads are added up, and merge: x [B, N, D], sizes [B, N] or None.

    Returns x [B, N - r, D], sizes [B, N - r], the bias of these sizes and what makes the matching; r is one that fits.
    """
    batch, num_tokens, width = x.shape
    dim = metric.shape[-1] // heads
    left, num_a = num_tokens - r, split_counts(num_tokens, num_prefix_tokens)[0]
    out, out_sizes, bias = x.new_empty(batch, left, width), x.new_empty(batch, left), x.new_empty(batch, 1, 1, left)
    # Few ever ask for the matching, so its three tensors are cut out of one when they do.
    indices = x.new_empty(batch * (r + num_a), dtype=torch.int64)
    scratch = x.new_empty(_scratch_bytes(num_tokens, dim), dtype=torch.uint8)
    first = indices.data_ptr()
    second = first + 8 * batch * r
    _functions()[0](
        *(metric.data_ptr(), metric.stride(0), metric.stride(1), heads, dim),
        *(x.data_ptr(), x.stride(0), x.stride(1), width),
        *((None, 0) if sizes is None else (sizes.data_ptr(), sizes.stride(0))),
        *(batch, num_tokens, num_prefix_tokens, r),
        *(out.data_ptr(), out_sizes.data_ptr(), bias.data_ptr()),
        *(first, second, second + 8 * batch * r, scratch.data_ptr()),
    )
    return Merged(out, out_sizes, lambda: cut_matching(indices, batch, r, num_a - r, num_prefix_tokens), bias)


def cut_matching(indices: Tensor, batch: int, r: int, num_kept: int, num_prefix_tokens: int) -> Matching:
    """The matching in [B · (r + r + num_kept)] numbers: those merged, then their targets, then those kept."""
    merged, target, kept = indices.tensor_split([batch * r, 2 * batch * r])
    rows = batch, r
    return Matching(merged.view(rows), target.view(rows), kept.view(batch, num_kept), num_prefix_tokens)


@lru_cache(maxsize=1024)
def _scratch_bytes(num_tokens: int, dim: int) -> int:
    return int(_functions()[1](num_tokens, dim))


@cache
def _functions() -> tuple[Any, Any]:
    merge, scratch = library().dtem_match_and_merge, library().dtem_scratch_bytes
    merge.restype, merge.argtypes = None, _ARGUMENTS
    scratch.restype, scratch.argtypes = _NUMBER, (_NUMBER, _NUMBER)
    return merge, scratch


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)
