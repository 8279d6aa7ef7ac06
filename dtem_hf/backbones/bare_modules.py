"""Running what a module computes by other means, where nothing but that computation would be lost.

A module is bare where calling it does what its class says of its own weights, and nobody watches: no hook, no LoRA, no
quantised or offloaded weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all

from ..ops import products
from ..ops.recording import DTYPE


def is_hooked(module: Any) -> bool:
    """Whether calling a module does more than its class says: hooks, and forward passes put on the module itself."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def takes_more(module: Any) -> bool:
    """Whether a module's own class is what is called, and takes what its class has been taught to take."""
    return "forward" not in vars(module) or "_old_forward" in vars(module)  # accelerate's hooks hand all on


def drop(dropout: nn.Module, x: Tensor) -> Tensor:
    """Dropout, which is not called where it is off, as it costs a few microseconds there."""
    idle = type(dropout) is nn.Dropout and not dropout.training and not is_hooked(dropout)
    return x if idle and not hooks_of_all._has_any_global_hook() else dropout(x)


def multiplies_faster(x: Tensor, *linears: Any) -> bool:
    """Whether modules that run on rows x [..., D], or on as many, may be run as products, and are faster then."""
    return (
        products.can_multiply(x)  # first, as the numbers of a graph that is traced are none
        and has_own_weight(linears[0])
        and products.is_faster(x, linears[0].weight)
        and not hooks_of_all._has_any_global_hook()
        and all(_is_bare_linear(linear) for linear in linears)
    )


def as_product(linear: Any, gelu: str | None = None) -> Callable[[Tensor], Tensor]:
    """A bare linear module, and GELU behind it, as a function that goes by its weight."""
    return lambda x: products.multiply(x, linear.weight, linear.bias, gelu)


def has_own_weight(module: nn.Module) -> bool:
    """Whether a module is the linear map of its weight, and may be computed from it.

    LoRA and quantised weights know their own map, and an offloaded weight is there only while its module runs.
    """
    return type(module) is nn.Linear and not module.weight.is_meta


def _is_bare_linear(linear: Any) -> bool:
    if type(linear) is not nn.Linear or is_hooked(linear):
        return False
    # Asked of every layer in every pass: module attributes, and devices by name, would take twice as long.
    weight, bias = linear._parameters.get("weight"), linear._parameters.get("bias")
    return is_bare_parameter(weight) and (bias is None or is_bare_parameter(bias))


def is_bare_parameter(parameter: Any) -> bool:
    """Whether a parameter is one of torch's own, on a CPU, in what C and oneDNN compute in."""
    return type(parameter) is nn.Parameter and parameter.is_cpu and parameter.dtype == DTYPE
