"""Proportional attention: a token that stands for m patches counts m times (METHOD.md section 1)."""

import os

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import BadValue


# How log m reaches a fused kernel: as an additive mask, which some kernels do not take, or on the keys.
BIAS_FORMS = ("mask", "extended_keys")
_FORM = os.environ.get("DTEM_HF_SIZE_BIAS", "mask")
if _FORM not in BIAS_FORMS:
    raise BadValue("DTEM_HF_SIZE_BIAS", _FORM, f"one of {', '.join(BIAS_FORMS)}")
# Kernels take widths that are a multiple of it.
_UNIT = 8
# What is further down than that counts for nothing in any dtype, and by no scaling leaves float16.
_LOWEST_BIAS = -1e3


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


def biased_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    form: str | None = None,
) -> Tensor:
    """Fused attention with an additive bias, or without one: [B, H, n, d], twice [B, H, N, d] -> [B, H, n, d].

    `bias` is [B or 1, H or 1, 1 or n, N]. `form` is one of `BIAS_FORMS`, None for that of DTEM_HF_SIZE_BIAS in the
    environment; a bias that is not the same for all queries is a mask in any case.
    """
    form = _FORM if form is None else form
    if bias is None or form == "mask" or bias.shape[2] != 1 or not bias.is_floating_point():
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout, scale=scaling)
    extended = extend_keys(query, key, value, bias, scaling)
    return F.scaled_dot_product_attention(*extended, dropout_p=dropout, scale=scaling)[..., : value.shape[-1]]


def extend_keys(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, H, n, d + 8] whose attention without a mask is that of the given ones with `bias`.

    Queries get ones and keys bias / scaling, in a high and a low part as a low precision holds no more than eight or
    eleven bits of it; values get zeros, and so does the output, behind its first d features.
    """
    wanted = (bias.float().clamp(min=_LOWEST_BIAS) / scaling).transpose(2, 3).expand(*key.shape[:3], 1)
    high = wanted.to(key.dtype)
    low = (wanted - high.float()).to(key.dtype)
    ones, zeros = query.new_ones(*query.shape[:3], 2), [0, _UNIT - 2]
    return (
        F.pad(torch.cat([query, ones], dim=-1), zeros),
        F.pad(torch.cat([key, high, low], dim=-1), zeros),
        F.pad(value, [0, _UNIT]),
    )
