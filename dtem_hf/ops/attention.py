"""Proportional attention: a token that stands for m patches counts m times (METHOD.md section 1)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .autocast import is_autocast_on


# The size that an empty token counts as, by the dtype of attention. The gradient of a size is the gradient of its bias
# divided by that size: the floor must stay far above what the dtype resolves in a bias' gradient, and far below 1.
SMALLEST_SIZE = {torch.float64: 1e-12, torch.float32: 1e-8, torch.bfloat16: 1e-6, torch.float16: 1e-4}
# Attention kernels take head widths that are a multiple of 8.
_WIDTH_UNIT = 8
# A bias below this counts as minus infinity in every dtype, and float16 still holds it after scaling.
_LOWEST_BIAS = -1e3


def size_bias(sizes: Tensor, dtype: torch.dtype, exponents: Tensor | None = None) -> Tensor:
    """log m as an additive attention mask: sizes [B, N] -> [B, 1, 1, N] in `dtype`.

    With `exponents` [H], one per head: log of m to that power, [B, H, 1, N]; an empty token stays empty.

    The bias and its gradient are finite for a fully merged token (m = 0): a size below the smallest one that counts is
    read as that one, and its gradient is passed on as if it were not clamped.
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
    """The mask [B, 1, 1, N] of `size_bias` for every query, where a token always sees itself: [B, 1, N, N].

    It counts itself by its size [B, N], and once if that is less.
    """
    own = sizes.detach().clamp(min=1).log().to(bias.dtype)[:, None, None, :]
    return torch.where(torch.eye(sizes.shape[1], dtype=torch.bool, device=bias.device), own, bias)


def attention_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    """The dtype that attention computes in, of tokens of `dtype` on a kind of device: autocast's, where it is on."""
    return torch.get_autocast_dtype(device) if is_autocast_on(device) else dtype


def extend_keys(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, H, n, d + 8] whose attention without a mask equals that of the given with `bias`.

    Queries get ones, and keys bias / scaling in a high and a low part, as bfloat16 holds only eight bits of it. Values
    get zeros. The first d features of the output are the attention's.
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
