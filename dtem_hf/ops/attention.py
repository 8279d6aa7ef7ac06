"""Proportional attention: a token that stands for m patches counts m times (docs/method.md section 1)."""

import torch
from torch import Tensor
from torch.nn import functional as F


# Attention reads the size 0 as this floor, by its dtype. The gradient of a size is the gradient of its bias divided by
# the size, so the floor must be far above the rounding error of a bias' gradient, and far below 1.
SMALLEST_SIZE = {torch.float64: 1e-12, torch.float32: 1e-8, torch.bfloat16: 1e-6, torch.float16: 1e-4}
# Attention kernels need a head width that is a multiple of 8.
_WIDTH_UNIT = 8
# A bias below this counts as minus infinity in every dtype, and float16 still holds it after scaling.
_LOWEST_BIAS = -1e3


def size_bias(sizes: Tensor, dtype: torch.dtype, exponents: Tensor | None = None) -> Tensor:
    """log m as an additive attention mask: sizes [B, N] -> [B, 1, 1, N] in `dtype`.

    With `exponents` [H], the log of m to the power of each head, [B, H, 1, N]; an empty token stays empty.

    The bias and its gradient are finite for a fully merged token (m = 0): sizes are clamped to `SMALLEST_SIZE`, and
    the gradient passes straight through the clamp.
    """
    floor = SMALLEST_SIZE[dtype]
    sizes = sizes.to(torch.promote_types(sizes.dtype, torch.float32))
    clamped = sizes.clamp(min=floor)
    if sizes.requires_grad:
        clamped = sizes + (clamped - sizes).detach()
    bias = clamped.log().unsqueeze(1).unsqueeze(1)
    if exponents is not None:
        # A small power of the floor is not small: attention would see empty tokens.
        empty = (sizes <= floor)[:, None, None, :]
        bias = torch.where(empty, bias, bias * exponents.float()[:, None, None])
    return bias.to(dtype)


def see_itself(bias: Tensor, sizes: Tensor) -> Tensor:
    """The mask [B, 1, 1, N] of `size_bias` per query, in which every token sees itself: [B, 1, N, N].

    A token counts itself by its size [B, N], but at least once.
    """
    own = sizes.detach().clamp(min=1).log().to(bias.dtype)[:, None, None, :]
    return torch.where(torch.eye(sizes.shape[1], dtype=torch.bool, device=bias.device), own, bias)


def attention_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    """The dtype in which attention computes for tokens of `dtype` on a device type: autocast's if it is on."""
    return torch.get_autocast_dtype(device) if device != "meta" and torch.is_autocast_enabled(device) else dtype


def extend_keys(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Put an additive mask into features of the keys: [B, H, n, d] -> queries, keys and values [B, H, n, d + 8].

    Attention over the result, without a mask, equals attention over the arguments with `bias` [B, 1 or H, 1, n]; the
    first d features of its output count. Queries get ones, values zeros, and keys bias / scaling, in a high and a low
    part because bfloat16 holds only eight bits.
    """
    wanted = (bias.float().clamp(min=_LOWEST_BIAS) / scaling).transpose(2, 3).expand(*key.shape[:3], 1)
    high = wanted.to(key.dtype)
    low = (wanted - high.float()).to(key.dtype)
    ones, zeros = query.new_ones(*query.shape[:3], 2), [0, _WIDTH_UNIT - 2]
    return (
        F.pad(torch.cat([query, ones], dim=-1), zeros),
        F.pad(torch.cat([key, high, low], dim=-1), zeros),
        F.pad(value, [0, _WIDTH_UNIT]),
    )
