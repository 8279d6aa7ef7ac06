"""When matching and merging run as Triton kernels, and what torch.compile sees of them.

The kernels run on CUDA, where Triton is installed, and where no gradient flows through a merge. Everywhere else the
tensor operations of `matching.py` and `merging.py` run, which are the kernels' reference.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec

import torch
from torch import Tensor

from .forms import is_exporting


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The types of the devices that the kernels run on. find_spec does not import Triton, which takes a while.
devices: tuple[str, ...] = ("cuda",) if find_spec("triton") is not None else ()


@contextmanager
def disabled() -> Iterator[None]:
    """Inside the block the tensor operations run on CUDA, too: for benchmarks that compare both."""
    global devices
    before, devices = devices, ()
    try:
        yield
    finally:
        devices = before


def can_match(metric: Tensor) -> bool:
    """Whether `match` runs on a metric that lies on one of `devices`. An exported graph holds no kernel."""
    return metric.dtype in _DTYPES and not is_exporting()


def can_merge(x: Tensor, sizes: Tensor | None) -> bool:
    """Whether `merge_tokens` runs on tokens on one of `devices`: not where a gradient has to come back through it."""
    if not can_match(x):
        return False
    return not (torch.is_grad_enabled() and (x.requires_grad or (sizes is not None and sizes.requires_grad)))


def match(metric: Tensor, r: int, num_prefix_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """What `ops.bipartite_soft_matching` returns, for r above 0; the similarity matrix is never stored."""
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
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


# Opaque to torch.compile, which needs only the shapes of what they return.
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
