"""Matching and merging as Triton kernels (docs/method.md section 3); `kernels.py` imports and calls them on CUDA."""

# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from .splitting import split_counts


_SMALLEST_NORM = tl.constexpr(1e-12)  # of torch.nn.functional.normalize
_SMALLEST_TOTAL = tl.constexpr(1e-12)  # of merge_tokens


@triton.jit
def _best_partner_kernel(
    metric,
    best,
    partner,
    num_a,
    num_b,
    width,
    num_prefix_tokens,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Compare rows of A with all of B, tile by tile, and keep only the maximum and its first place."""
    image = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    features = tl.arange(0, BLOCK_D)
    first_a = num_prefix_tokens + num_prefix_tokens % 2
    first_b = num_prefix_tokens + 1 - num_prefix_tokens % 2
    tokens = metric + image * (num_prefix_tokens + num_a + num_b) * width
    a_tokens = tokens + (first_a + 2 * rows)[:, None] * width
    highest = tl.full([BLOCK_A], float("-inf"), tl.float32)
    place = tl.zeros([BLOCK_A], tl.int32)
    square_a = tl.zeros([BLOCK_A], tl.float32)
    for start in range(0, width, BLOCK_D):
        inside = (start + features) < width
        a = tl.load(a_tokens + (start + features)[None, :], mask=(rows < num_a)[:, None] & inside[None, :], other=0.0)
        square_a += tl.sum(a.to(tl.float32) * a.to(tl.float32), axis=1)
    for first in range(0, num_b, BLOCK_B):
        columns = first + tl.arange(0, BLOCK_B)
        b_tokens = tokens + (first_b + 2 * columns)[:, None] * width
        product = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
        square_b = tl.zeros([BLOCK_B], tl.float32)
        for start in range(0, width, BLOCK_D):
            inside = (start + features) < width
            offsets = (start + features)[None, :]
            a = tl.load(a_tokens + offsets, mask=(rows < num_a)[:, None] & inside[None, :], other=0.0)
            b = tl.load(b_tokens + offsets, mask=(columns < num_b)[:, None] & inside[None, :], other=0.0)
            square_b += tl.sum(b.to(tl.float32) * b.to(tl.float32), axis=1)
            if WIDEN:
                a, b = a.to(tl.float32), b.to(tl.float32)
            # Products of half-precision numbers are exact in float32; TF32 would round those of float32.
            product = tl.dot(a, tl.trans(b), product, input_precision="ieee")
        norm_b = tl.maximum(tl.sqrt(square_b), _SMALLEST_NORM)
        scores = tl.where((columns < num_b)[None, :], product / norm_b[None, :], float("-inf"))
        tile_highest, tile_place = tl.max(scores, axis=1, return_indices=True)  # the first of equal maxima
        better = tile_highest > highest
        place = tl.where(better, first + tile_place, place)
        highest = tl.where(better, tile_highest, highest)
    norm_a = tl.maximum(tl.sqrt(square_a), _SMALLEST_NORM)
    tl.store(best + image * num_a + rows, highest / norm_a, mask=rows < num_a)
    tl.store(partner + image * num_a + rows, place.to(tl.int64), mask=rows < num_a)


@triton.jit
def _order_kernel(
    best,
    partner,
    leaving,
    joined,
    staying,
    num_tokens,
    num_prefix_tokens,
    num_a,
    num_leaving,
    BLOCK_A: tl.constexpr,
    BLOCK_OTHERS: tl.constexpr,
):
    """Order the tokens of one image: the rank of an A token's score decides whether it leaves, and its place."""
    image = tl.program_id(0).to(tl.int64)
    first_a = num_prefix_tokens + num_prefix_tokens % 2
    first_b = num_prefix_tokens + 1 - num_prefix_tokens % 2
    scores = best + image * num_a
    rows = tl.arange(0, BLOCK_A)
    is_a = rows < num_a
    own = tl.load(scores + rows, mask=is_a, other=float("-inf"))
    own = tl.where(own == own, own, float("inf"))  # NaN as infinity: every token needs a different rank
    rank = tl.zeros([BLOCK_A], tl.int32)
    for first in range(0, num_a, BLOCK_OTHERS):
        others = first + tl.arange(0, BLOCK_OTHERS)
        other = tl.load(scores + others, mask=others < num_a, other=float("-inf"))
        other = tl.where(other == other, other, float("inf"))
        higher = other[None, :] > own[:, None]
        equal_before = (other[None, :] == own[:, None]) & (others[None, :] < rows[:, None])
        rank += tl.sum(((higher | equal_before) & (others < num_a)[None, :]).to(tl.int32), axis=1)
    leaves = is_a & (rank < num_leaving)
    stays = is_a & (rank >= num_leaving)
    first_of_b = num_prefix_tokens + num_a - num_leaving  # in the output
    joins = tl.load(partner + image * num_a + rows, mask=leaves, other=0) + first_of_b
    tl.store(leaving + image * num_leaving + rank, (first_a + 2 * rows).to(tl.int64), mask=leaves)
    tl.store(joined + image * num_leaving + rank, joins, mask=leaves)
    outputs = staying + image * (num_tokens - num_leaving)
    place = num_prefix_tokens + tl.cumsum(stays.to(tl.int32), axis=0) - 1
    tl.store(outputs + place, (first_a + 2 * rows).to(tl.int64), mask=stays)
    for first in range(0, num_prefix_tokens, BLOCK_A):
        prefix = first + rows
        tl.store(outputs + prefix, prefix.to(tl.int64), mask=prefix < num_prefix_tokens)
    num_b = num_tokens - num_prefix_tokens - num_a
    for first in range(0, num_b, BLOCK_A):
        b = first + rows
        tl.store(outputs + first_of_b + b, (first_b + 2 * b).to(tl.int64), mask=b < num_b)


@triton.jit
def _merge_kernel(
    x,
    sizes,
    leaving,
    joined,
    staying,
    out,
    out_sizes,
    num_tokens,
    width,
    num_leaving,
    HAS_SIZES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write one output token: the staying token and the tokens that join it, best score first."""
    row = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    output = image * (num_tokens - num_leaving) + row
    features = tl.arange(0, BLOCK_D)
    inside = features < width
    tokens = x + image * num_tokens * width
    own = tl.load(staying + output).to(tl.int32)
    value = tl.load(tokens + own * width + features, mask=inside, other=0.0)
    size = 1.0
    if HAS_SIZES:
        size = tl.load(sizes + image * num_tokens + own)
    total = size
    result = value.to(tl.float32) * size
    for i in range(0, num_leaving):
        if tl.load(joined + image * num_leaving + i) == row:
            joining = tl.load(leaving + image * num_leaving + i).to(tl.int32)
            joining_size = 1.0
            if HAS_SIZES:
                joining_size = tl.load(sizes + image * num_tokens + joining)
            joiner = tl.load(tokens + joining * width + features, mask=inside, other=0.0)
            result += joiner.to(tl.float32) * joining_size
            total += joining_size
    mean = (result / tl.maximum(total, _SMALLEST_TOTAL)).to(value.dtype)
    tl.store(out + output * width + features, tl.where(total == size, value, mean), mask=inside)
    tl.store(out_sizes + output, total)


def best_partner(metric: Tensor, num_prefix_tokens: int) -> tuple[Tensor, Tensor]:
    """The highest cosine of every A token and its first B token: metric [B, N, d] -> float32 and int64 [B, a].

    The similarity matrix is never stored.
    """
    metric = metric.contiguous()
    batch, num_tokens, width = metric.shape
    num_a, num_b = split_counts(num_tokens, num_prefix_tokens)
    best = metric.new_empty(batch, num_a, dtype=torch.float32)
    partner = metric.new_empty(batch, num_a, dtype=torch.int64)
    block = 64
    _best_partner_kernel[(triton.cdiv(num_a, block), batch)](
        metric,
        best,
        partner,
        num_a,
        num_b,
        width,
        num_prefix_tokens,
        BLOCK_A=block,
        BLOCK_B=block,
        BLOCK_D=max(16, min(128, triton.next_power_of_2(width))),
        WIDEN=not metric.is_cuda,  # off CUDA Triton's interpreter runs, which multiplies bfloat16 wrongly
    )
    return best, partner


def match(metric: Tensor, r: int, num_prefix_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.bipartite_soft_matching` in two launches: metric [B, N, d] -> [B, r], [B, r], [B, N - r]."""
    best, partner = best_partner(metric, num_prefix_tokens)
    batch, num_tokens, _ = metric.shape
    num_a = best.shape[1]
    leaving, joined, staying = (partner.new_empty(batch, n) for n in (r, r, num_tokens - r))
    block = max(16, triton.next_power_of_2(num_a))
    _order_kernel[(batch,)](
        best,
        partner,
        leaving,
        joined,
        staying,
        num_tokens,
        num_prefix_tokens,
        num_a,
        r,
        BLOCK_A=block,
        BLOCK_OTHERS=max(1, min(64, 8192 // block)),
    )
    return leaving, joined, staying


def merge_tokens(
    x: Tensor, sizes: Tensor | None, leaving: Tensor, joined: Tensor, staying: Tensor
) -> tuple[Tensor, Tensor]:
    """`ops.merge_tokens` in one launch: every output token is written once, features and size together."""
    x = x.contiguous()
    batch, num_tokens, width = x.shape
    num_staying = staying.shape[1]
    out = x.new_empty(batch, num_staying, width)
    out_sizes = x.new_empty(batch, num_staying, dtype=torch.float32)
    _merge_kernel[(num_staying, batch)](
        x,
        x if sizes is None else sizes.contiguous(),
        leaving.contiguous(),
        joined.contiguous(),
        staying.contiguous(),
        out,
        out_sizes,
        num_tokens,
        width,
        leaving.shape[1],
        HAS_SIZES=sizes is not None,
        BLOCK_D=triton.next_power_of_2(width),
    )
    return out, out_sizes
