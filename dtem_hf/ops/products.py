"""Linear maps in float32 on a CPU by oneDNN, where MKL, which torch takes, is the slower one.

oneDNN takes the weights as they lie, so nothing is packed, copied or kept, and applies GELU to the product while it is
at hand. `F.linear` is the reference, and what runs wherever this does not: it was measured on AMD's processors only,
and MKL is at home on Intel's.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .recording import only_infers
from .switches import is_on


# A call costs some twenty microseconds more than MKL's: less than it saves from these sizes on.
_SMALLEST_WEIGHT = 2**17
_LARGE_WEIGHT = 2**19
_FEWEST_PRODUCTS = 2**23
_FEWEST_ROWS = 4


def can_multiply(x: Tensor) -> bool:
    """Whether `multiply` may run on rows x [..., D], of whatever weight."""
    return only_infers(x) and torch._C._get_mkldnn_enabled() and is_available()


def is_faster(x: Tensor, weight: Tensor) -> bool:
    """Whether `multiply` takes less time than `F.linear`: x [..., D], weight [E, D]."""
    size = weight.numel()
    if size < _SMALLEST_WEIGHT:
        return False
    rows = x.numel() // weight.size(1)
    return rows >= _FEWEST_ROWS and (size >= _LARGE_WEIGHT or rows * size >= _FEWEST_PRODUCTS)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: str | None = None) -> Tensor:
    """x W^T + b, or GELU of it where `gelu` names F.gelu's approximation: x [..., D], W [E, D], b [E], all float32."""
    if bias is not None:
        bias = bias.contiguous()  # it would be read as if it were
    if gelu is None:
        return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "gelu", [], gelu)


@cache
def is_available() -> bool:
    """Whether torch has both libraries, and MKL is away from home. DTEM_HF_NATIVE=0 in the environment says no."""
    if not is_on("DTEM_HF_NATIVE") or not sys.platform.startswith("linux"):
        return False
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        return False
    try:
        vendor = Path("/proc/cpuinfo").read_text().partition("vendor_id")[2].partition("\n")[0]
        return "AuthenticAMD" in vendor and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    except (OSError, RuntimeError):
        return False
