"""Proportional attention: a token that stands for m patches counts m times (METHOD.md section 1)."""

import torch
from torch import Tensor


# What an empty token counts as, by the dtype that attention computes in. The gradient that reaches a size is the
# gradient of its bias divided by that size, so the floor must stay far above what the dtype can resolve in a bias'
# gradient, and far below one patch.
SMALLEST_SIZE = {torch.float64: 1e-12, torch.float32: 1e-8, torch.bfloat16: 1e-6, torch.float16: 1e-4}


def size_bias(sizes: Tensor, dtype: torch.dtype, exponents: Tensor | None = None) -> Tensor:
    """log m as an additive attention mask: sizes [B, N] -> [B, 1, 1, N] in `dtype`.

    With `exponents` [H], one per head: log of m to that power, [B, H, 1, N]. A token of no size has none to any power.

    Finite for a fully merged token (m = 0), and so is its gradient, which is the exact one taken at the smallest size
    that counts: sizes below it are read as that size going forward and are differentiated as if they were not clamped.
    """
    floor = SMALLEST_SIZE[dtype]
    sizes = sizes.float()
    clamped = sizes.clamp(min=floor)
    if sizes.requires_grad:
        clamped = sizes + (clamped - sizes).detach()
    bias = clamped.log()[:, None, None, :]
    if exponents is not None:
        # To a small power the floor would be no small size, and empty tokens would be attended to.
        empty = (sizes <= floor)[:, None, None, :]
        bias = torch.where(empty, bias, bias * exponents.float()[:, None, None])
    return bias.to(dtype)
