"""Running what a module computes by other means, where nothing but that computation would be lost.

A module is bare where calling it does what its class says of its own weights, and nobody watches: no hook, no LoRA, no
quantised or offloaded weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import GELUActivation, GELUTanh
from transformers.utils import output_capturing

from ..ops import products
from ..ops.fused_layer import Affine
from ..ops.recording import DTYPE


# As they were when this was imported.
_LINEAR, _LAYER_NORM, _ATTENTION = F.linear, F.layer_norm, F.scaled_dot_product_attention
_LINEAR_FORWARD, _LAYER_NORM_FORWARD, _CALL = nn.Linear.forward, nn.LayerNorm.forward, nn.Module.__call__


def is_hooked(module: Any) -> bool:
    """Whether calling a module does more than its class says: hooks, and forward passes put on the module itself.

    transformers' recorders stay on modules once they were asked for anything; they count while they are asked.
    """
    if module._forward_pre_hooks or "forward" in vars(module):
        return True
    return bool(module._forward_hooks) and not _are_idle_recorders(module._forward_hooks.values())


def _are_idle_recorders(hooks: Iterable[Any]) -> bool:
    if torch.compiler.is_compiling() or any(hook.__module__ != output_capturing.__name__ for hook in hooks):
        return False
    # Hidden states are recorded where a whole layer is called, and of its parts nothing but attention's weights.
    return {"hidden_states", "_hidden_states_layers"}.issuperset(output_capturing._active_collector.get() or ())


def all_are_hooked() -> bool:
    """Whether hooks watch every module there is."""
    hooks = torch.nn.modules.module
    return bool(
        hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
        or hooks._global_backward_hooks
        or hooks._global_backward_pre_hooks
    )


def computes_as_torch() -> bool:
    """Whether nobody has put other functions in the place of those that layers are made of."""
    return (
        F.linear is _LINEAR
        and F.layer_norm is _LAYER_NORM
        and F.scaled_dot_product_attention is _ATTENTION
        and nn.Linear.forward is _LINEAR_FORWARD
        and nn.LayerNorm.forward is _LAYER_NORM_FORWARD
        and nn.Module.__call__ is _CALL
    )


def takes_more(module: Any) -> bool:
    """Whether a module's own class is what is called, and takes what its class has been taught to take."""
    return "forward" not in vars(module) or "_old_forward" in vars(module)  # accelerate's hooks hand all on


def drop(dropout: nn.Module, x: Tensor) -> Tensor:
    """Dropout, which is not called where it is off, as it costs a few microseconds there."""
    idle = type(dropout) is nn.Dropout and not dropout.training and not is_hooked(dropout)
    return x if idle and not all_are_hooked() else dropout(x)


def multiplies_faster(x: Tensor, *linears: Any) -> bool:
    """Whether modules that run on rows x [..., D], or on as many, may be run as products, and are faster then."""
    if not products.can_multiply(x):  # first, as the numbers of a graph that is traced are none
        return False
    first = bare_linear(linears[0])
    if first is None or not products.is_faster(x, first.weight):
        return False
    return not all_are_hooked() and computes_as_torch() and all(bare_linear(linear) for linear in linears[1:])


def as_product(linear: Any, gelu: str | None = None) -> Callable[[Tensor], Tensor]:
    """A bare linear module, and GELU behind it, as a function that goes by its weight."""
    return lambda x: products.multiply(x, linear.weight, linear.bias, gelu)


def has_own_weight(module: nn.Module) -> bool:
    """Whether a module is the linear map of its weight, and may be computed from it.

    LoRA and quantised weights know their own map, and an offloaded weight is there only while its module runs.
    """
    return type(module) is nn.Linear and not module.weight.is_meta


def bare_linear(module: Any) -> Affine | None:
    """The weight [E, D] and bias [E] of a bare linear module; None for any other."""
    found = _bare_affine(module) if type(module) is nn.Linear else None
    return None if found is None or found.weight is None else found


def bare_norm(module: Any) -> Affine | None:
    """The weight and bias of a bare LayerNorm, or none of both; None for any other module."""
    return _bare_affine(module) if type(module) is nn.LayerNorm else None


def _bare_affine(module: Any) -> Affine | None:
    # Asked of every layer in every pass: module attributes, and devices by name, would take twice as long.
    parameters = module._parameters
    # What is no parameter (a buffer, a tensor that is computed anew) is not among them, not even as None.
    if is_hooked(module) or "weight" not in parameters or "bias" not in parameters:
        return None
    weight, bias = parameters["weight"], parameters["bias"]
    if weight is not None and not is_bare_parameter(weight):
        return None
    return None if bias is not None and not is_bare_parameter(bias) else Affine(weight, bias)


def is_bare_parameter(parameter: Any) -> bool:
    """Whether a parameter is one of torch's own, on a CPU, in what C and oneDNN compute in."""
    return type(parameter) is nn.Parameter and parameter.is_cpu and parameter.dtype == DTYPE


def gelu_of(activation: Any) -> str | None:
    """F.gelu's name for the approximation that an activation of transformers is; None for another function."""
    if type(activation) not in (GELUActivation, GELUTanh):
        return None
    function = activation.act
    if isinstance(function, partial):
        known = function.func is F.gelu and not function.args and function.keywords == {"approximate": "tanh"}
        return "tanh" if known else None
    return "none" if function is F.gelu else None
