"""Decide when matching and merging run as Triton kernels, and register the kernels for torch.compile.

The kernels run on CUDA if Triton is installed and no gradient flows through the merge. In all other cases the tensor
operations of `matching.py` and `merging.py` run; they are the kernels' reference.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec

import torch
from torch import Tensor

from .forms import is_exporting


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The device types that the kernels run on. find_spec does not import Triton: that would be slow.
devices: tuple[str, ...] = ("cuda",) if find_spec("triton") is not None else ()


@contextmanager
def disabled() -> Iterator[None]:
    """Inside the block the tensor operations run on CUDA, too; benchmarks compare both."""
    global devices
    before, devices = devices, ()
    try:
        yield
    finally:
        devices = before


def can_match(metric: Tensor) -> bool:
    """Whether `match` can run on a metric that is on one of `devices`. Exported graphs hold no kernel."""
    return metric.dtype in _DTYPES and not is_exporting()


def can_merge(x: Tensor, sizes: Tensor | None) -> bool:
    """Whether `merge_tokens` can run on tokens that are on one of `devices`; the kernel has no backward pass."""
    if not can_match(x):
        return False
    return not (torch.is_grad_enabled() and (x.requires_grad or (sizes is not None and sizes.requires_grad)))


def match(metric: Tensor, r: int, num_prefix_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.bipartite_soft_matching` for r above 0; the similarity matrix is never stored."""
    run = _match_op if torch.compiler.is_compiling() else _match
    return run(metric.detach(), r, num_prefix_tokens)


def merge_tokens(
    x: Tensor, sizes: Tensor | None, leaving: Tensor, joined: Tensor, staying: Tensor
) -> tuple[Tensor, Tensor]:
    """`ops.merge_tokens` in one launch: every output token is written once, features and size together."""
    run = _merge_tokens_op if torch.compiler.is_compiling() else _merge_tokens
    return run(x, sizes, leaving, joined, staying)


def _match(metric: Tensor, r: int, num_prefix_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    from . import triton_kernels

    with _on(metric):
        return triton_kernels.match(metric, r, num_prefix_tokens)


def _merge_tokens(
    x: Tensor, sizes: Tensor | None, leaving: Tensor, joined: Tensor, staying: Tensor
) -> tuple[Tensor, Tensor]:
    from . import triton_kernels

    with _on(x):
        return triton_kernels.merge_tokens(x, sizes, leaving, joined, staying)


def _on(x: Tensor) -> AbstractContextManager[object]:
    """Make a tensor's device the current one: Triton launches on that."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


# torch.compile does not look inside these; it needs only the shapes of their outputs.
_match_op = torch.library.custom_op("dtem_hf::match", _match, mutates_args=())
_merge_tokens_op = torch.library.custom_op("dtem_hf::merge_tokens", _merge_tokens, mutates_args=())


@_match_op.register_fake
def _(metric: Tensor, r: int, num_prefix_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, num_tokens = metric.shape[:2]
    lengths = r, r, num_tokens - r
    leaving, joined, staying = (metric.new_empty(batch, n, dtype=torch.int64) for n in lengths)
    return leaving, joined, staying


@_merge_tokens_op.register_fake
def _(x: Tensor, sizes: Tensor | None, leaving: Tensor, joined: Tensor, staying: Tensor) -> tuple[Tensor, Tensor]:
    shape = staying.shape
    return x.new_empty(*shape, x.shape[2]), x.new_empty(shape, dtype=torch.float32)
