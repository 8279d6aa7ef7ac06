"""Whether operations may be swapped for faster ones that nobody else knows."""

import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext


# What C and oneDNN compute in.
DTYPE = torch.float32


def infers(x: Tensor) -> bool:
    """Whether what is done to x is inference on a CPU in float32."""
    plain = type(x) is Tensor and x.is_cpu and x.dtype == DTYPE
    return plain and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def only_infers(x: Tensor) -> bool:
    """Whether that is all, and nobody wants more of it than the result."""
    return infers(x) and not is_recorded()


def is_overridden() -> bool:
    """Whether somebody has put other functions in the place of torch's; where new tensors go by default is no such."""
    if torch._C._len_torch_function_stack() == 0:
        return False
    return any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())


def is_recorded() -> bool:
    """Whether somebody writes down, counts or transforms the operations that run, and would miss another one."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd.forward_ad._current_level >= 0
        or is_overridden()
    )
