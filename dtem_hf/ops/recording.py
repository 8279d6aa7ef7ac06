"""Whether operations may be swapped for faster ones that nobody else knows."""

import torch


def is_recorded() -> bool:
    """Whether somebody writes down, counts or transforms the operations that run, and would miss another one."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd.forward_ad._current_level >= 0
    )
