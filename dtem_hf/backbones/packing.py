"""Several linear maps of the same input as one matrix product, where a model only infers on a CPU.

One wide product is faster than three or four narrow ones, most of all for small batches. The first pass without
gradients puts the weights next to each other in memory; parameters, their names and values stay what they are, and
whatever is done to them in place is done to the packed ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import has_own_weight


class _Packed(NamedTuple):
    """`places` says where every parameter's numbers must still be for `weight` and `bias` to be theirs."""

    weight: Tensor
    bias: Tensor | None
    widths: list[int]
    places: list[int]


_PACKED: WeakKeyDictionary[nn.Module, _Packed] = WeakKeyDictionary()


def project(owner: nn.Module, linears: Sequence[Any], x: Tensor) -> Sequence[Tensor] | None:
    """What linear maps make of x [B, n, D], in one product; None where they had better run one by one.

    `owner` is the module that they are packed for.
    """
    if x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    if torch.is_autocast_enabled("cpu") or not all(_may_be_packed(linear) for linear in linears):
        return None
    packed = _PACKED.get(owner)
    if packed is None or packed.places != _places(linears):
        parameters = [p for linear in linears for p in (linear.weight, linear.bias) if p is not None]
        if not all(map(_may_be_moved, parameters)) or len({p.dtype for p in parameters}) > 1:
            return None
        _PACKED[owner] = packed = _pack(linears)
    return F.linear(x, packed.weight, packed.bias).split(packed.widths, dim=-1)


def _places(linears: Sequence[Any]) -> list[int]:
    return [0 if p is None else p.data_ptr() for linear in linears for p in (linear.weight, linear.bias)]


def _pack(linears: Sequence[Any]) -> _Packed:
    widths = [len(linear.weight) for linear in linears]
    biases = [linear.bias for linear in linears]
    # Parameters that came from inference mode could not be trained any more.
    with torch.inference_mode(False), torch.no_grad():
        weight, bias = torch.cat([linear.weight for linear in linears]), None
        for linear, part in zip(linears, weight.split(widths), strict=True):
            linear.weight.data = part
        if any(b is not None for b in biases):
            parts = [weight.new_zeros(n) if b is None else b for b, n in zip(biases, widths, strict=True)]
            bias = torch.cat(parts)
            for own, part in zip(biases, bias.split(widths), strict=True):
                if own is not None:
                    own.data = part
    return _Packed(weight, bias, widths, _places(linears))


def _may_be_packed(linear: nn.Module) -> bool:
    """Whether a module is no more than the map of its weight, with no hook around it, accelerate's either."""
    hooked = linear._forward_hooks or linear._forward_pre_hooks or "_old_forward" in vars(linear)
    return has_own_weight(linear) and not hooked


def _may_be_moved(parameter: nn.Parameter) -> bool:
    """Whether a parameter's numbers may lie somewhere else: not where other processes share them."""
    plain = type(parameter) is nn.Parameter and parameter.device.type == "cpu"
    return plain and not parameter.is_inference() and not parameter.is_shared()
