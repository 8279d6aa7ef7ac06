"""A pre-norm transformer layer that merges, on a CPU in float32, in one call of compiled C (METHOD.md section 1).

A layer of few tokens is over before the operations it is made of have been called. In one call nothing is called, the
metric is one more product of the rows that make queries, keys and values, GELU, scales and residuals are added where a
product is at hand, and weights are read as they lie: nothing is packed, copied or kept. The same modules one after the
other are the reference, and what runs wherever this does not. Every number is computed by the same instructions,
whatever the batch and the number of threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from .compiled import library
from .matching import Matching, split_counts
from .merging import Merged
from .recording import infers, only_infers


# By the name of the function, as the C counts them.
ACTIVATIONS = {"gelu": 0, "gelu_tanh": 1, "quick_gelu": 2}


class Affine(NamedTuple):
    """A linear map, or what a norm multiplies by and adds: weight [E, D] or [D], bias [E] or [D], or none of both."""

    weight: Any
    bias: Any


class LayerWeights(NamedTuple):
    """What a layer is made of, all of it float32, contiguous and on the CPU.

    x += scale1 · output(attention(norm1(x))), then the merge, then x += scale2 · shrink(activation(grow(norm2(x)))).
    """

    norm1: Affine
    query: Affine
    key: Affine
    value: Affine
    output: Affine
    norm2: Affine
    grow: Affine
    shrink: Affine
    scale1: Tensor | None
    scale2: Tensor | None
    heads: int
    scaling: float
    norm1_eps: float
    norm2_eps: float
    activation: str


class MergePart(NamedTuple):
    """How a layer merges: r tokens, the first `num_prefix_tokens` not among them.

    Compared by `embedding` of the normed tokens, or, where there is none, by their keys, added up over heads.
    `norm_power` [1] is the share of its length that a mean is given back.
    """

    r: int
    num_prefix_tokens: int
    embedding: Affine | None = None
    norm_power: Tensor | None = None


class Scratch:
    """Memory that the layers of one pass take in turn, so that it is fetched once."""

    def __init__(self) -> None:
        self._taken: Tensor | None = None

    def take(self, size: int) -> int:
        """The address of so many bytes, until more are taken."""
        if self._taken is None or self._taken.numel() < size:
            self._taken = torch.empty(size, dtype=torch.uint8, device="cpu")
        return self._taken.data_ptr()


_POINTER, _NUMBER, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class _Linear(ctypes.Structure):
    _fields_ = [("weight", _POINTER), ("bias", _POINTER), ("in_features", _NUMBER), ("out_features", _NUMBER)]


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class _Layer(ctypes.Structure):
    _fields_ = [
        *_fields(_Linear, "query key value output embedding grow shrink"),
        *_fields(_POINTER, "norm1_weight norm1_bias norm2_weight norm2_bias scale1 scale2"),
        *_fields(_FLOAT, "norm1_eps norm2_eps scaling"),
        *_fields(_NUMBER, "heads activation"),
        *_fields(_POINTER, "x sizes bias"),
        *_fields(_NUMBER, "x_image x_token sizes_image bias_image bias_head"),
        *_fields(_NUMBER, "batch n prefix r rows"),
        *_fields(_POINTER, "norm_power out out_sizes out_logs merged target kept scratch"),
        *_fields(_NUMBER, "threads"),
        *_fields(_POINTER, "seconds"),
    ]


# Where parts of layers are timed to, while they are.
_WATCH: ctypes.Array[ctypes.c_double] | None = None


@contextmanager
def timed_parts() -> Iterator[ctypes.Array[ctypes.c_double]]:
    """Inside the block, seconds that layers have spent on an embedding, and on matching and merging, are added up.

    Of all threads: not for two measurements at a time.
    """
    global _WATCH
    seconds = (ctypes.c_double * 2)()
    before, _WATCH = _WATCH, seconds
    try:
        yield seconds
    finally:
        _WATCH = before


def can_run(x: Tensor) -> bool:
    """Whether `run` may run on tokens [B, N, D], whatever the layer. An exported graph has to do without."""
    if torch.compiler.is_compiling():
        return infers(x) and not torch.compiler.is_exporting() and _is_available_to_graphs()
    return only_infers(x) and x.shape[0] > 0 and is_available()


@torch.compiler.assume_constant_result
def _is_available_to_graphs() -> bool:
    return is_available()


@cache
def is_available() -> bool:
    """Whether the compiled C is there, in vectors of eight numbers or more, with the threads that torch has."""
    return library() is not None and bool(_functions().dtem_layer_is_fast())


def run(
    x: Tensor,
    weights: LayerWeights,
    sizes: Tensor | None = None,
    bias: Tensor | None = None,
    merge: MergePart | None = None,
    num_rows: int | None = None,
    scratch: Scratch | None = None,
) -> tuple[Tensor, Merged | None]:
    """Run a layer on x [B, N, D]; returns [B, N - r, D], and what the merge left, if there is one.

    `sizes` [B, N] count in the merge (None: all are 1), `bias` [B or 1, H or 1, 1, N] in attention, both float32.
    Without a merge, `num_rows` says how many of the first tokens are wanted: [B, num_rows, D].
    """
    merge = merge if merge is not None and merge.r else None
    left = (x.shape[1] if num_rows is None else num_rows) - (0 if merge is None else merge.r)
    if torch.compiler.is_compiling():
        out, *rest = _run_in_graph(x, weights, sizes, bias, merge, left)
    else:
        profiled = torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
        with record_function("dtem_hf::fused_layer") if profiled else nullcontext():
            out, *rest = _run(x, weights, sizes, bias, merge, left, Scratch() if scratch is None else scratch)
    if merge is None:
        return out, None
    out_sizes, logs, merged, target, kept = rest
    return out, Merged(out, out_sizes, lambda: Matching(merged, target, kept, merge.num_prefix_tokens), logs)


def _run(
    x: Tensor,
    weights: LayerWeights,
    sizes: Tensor | None,
    bias: Tensor | None,
    merge: MergePart | None,
    left: int,
    scratch: Scratch,
) -> tuple[Tensor, ...]:
    """x [B, left, D] and, behind a merge, sizes, their logarithms, and a matching's merged, target and kept."""
    x = _with_rows(x)
    sizes, bias = None if sizes is None else _with_rows(sizes), None if bias is None else _with_rows(bias)
    out = _empty_outputs(x, merge, left)
    layer = _Layer(
        *(_linear(part) for part in weights[1:5]),
        _Linear() if merge is None or merge.embedding is None else _linear(merge.embedding),
        *(_linear(part) for part in weights[6:8]),
        *(_of_weight(tensor) for tensor in (*weights.norm1, *weights.norm2, weights.scale1, weights.scale2)),
        *(weights.norm1_eps, weights.norm2_eps, weights.scaling, weights.heads, ACTIVATIONS[weights.activation]),
        *(x.data_ptr(), _pointer(sizes), _pointer(bias), x.stride(0), x.stride(1)),
        0 if sizes is None else sizes.stride(0),
        *((0, 0) if bias is None else (_stride(bias, 0), _stride(bias, 1))),
        *x.shape[:2],
        *((0, 0, left) if merge is None else (merge.num_prefix_tokens, merge.r, left + merge.r)),
        None if merge is None else _pointer(merge.norm_power),
        *(tensor.data_ptr() for tensor in out),
    )
    layer.threads = torch.get_num_threads()
    watch = _WATCH  # held on to, as a pass may outlast the block
    layer.seconds = None if watch is None else ctypes.addressof(watch)
    functions, pointer = _functions(), ctypes.byref(layer)
    layer.scratch = scratch.take(functions.dtem_layer_scratch_bytes(pointer))
    functions.dtem_layer(pointer)
    return out


def _empty_outputs(x: Tensor, merge: MergePart | None, left: int) -> tuple[Tensor, ...]:
    batch, num_tokens, width = x.shape
    out = x.new_empty(batch, left, width)
    if merge is None:
        return (out,)
    kept = split_counts(num_tokens, merge.num_prefix_tokens)[0] - merge.r
    indices = (x.new_empty(batch, count, dtype=torch.int64) for count in (merge.r, merge.r, kept))
    return out, x.new_empty(batch, left), x.new_empty(batch, 1, 1, left), *indices


def _run_in_graph(
    x: Tensor,
    weights: LayerWeights,
    sizes: Tensor | None,
    bias: Tensor | None,
    merge: MergePart | None,
    left: int,
) -> list[Tensor]:
    """`_run` as one operation of a compiled graph, which takes no tuples."""
    w = weights
    return _operation(
        x,
        [*w.norm1, *w.query, *w.key, *w.value, *w.output, *w.norm2, *w.grow, *w.shrink],
        [w.scale1, w.scale2],
        [*((None, None) if merge is None or merge.embedding is None else merge.embedding)],
        None if merge is None else merge.norm_power,
        sizes,
        bias,
        w.heads,
        [w.scaling, w.norm1_eps, w.norm2_eps],
        w.activation,
        *((0, 0) if merge is None else (merge.r, merge.num_prefix_tokens)),
        left,
    )


@torch.library.custom_op("dtem_hf::fused_layer", mutates_args=())
def _operation(
    x: Tensor,
    parts: Sequence[Tensor | None],
    scales: Sequence[Tensor | None],
    embedding: Sequence[Tensor | None],
    norm_power: Tensor | None,
    sizes: Tensor | None,
    bias: Tensor | None,
    heads: int,
    scaling_and_eps: Sequence[float],
    activation: str,
    r: int,
    num_prefix_tokens: int,
    left: int,
) -> list[Tensor]:
    fields: list[Any] = [Affine(*parts[i : i + 2]) for i in range(0, len(parts), 2)]
    weights = LayerWeights(*[*fields, *scales, heads, *scaling_and_eps, activation])
    learned = None if embedding[0] is None else Affine(*embedding)
    merge = MergePart(r, num_prefix_tokens, learned, norm_power) if r else None
    return list(_run(x, weights, sizes, bias, merge, left, Scratch()))


@_operation.register_fake
def _(x: Tensor, *others: Any) -> list[Tensor]:
    r, num_prefix_tokens, left = others[-3:]
    return list(_empty_outputs(x, MergePart(r, num_prefix_tokens) if r else None, left))


@_operation.register_vmap
def _(info: Any, in_dims: Any, *args: Any) -> tuple[list[Tensor], list[int]]:
    def chosen(arg: Any, dim: Any, i: int) -> Any:
        if isinstance(arg, (list, tuple)):
            return [chosen(part, of_part, i) for part, of_part in zip(arg, dim, strict=True)]
        return arg if dim is None else arg.select(dim, i)

    runs = [
        _operation(*(chosen(arg, dim, i) for arg, dim in zip(args, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    stacked = [torch.stack(outputs) for outputs in zip(*runs, strict=True)]
    return stacked, [0] * len(stacked)


def _with_rows(tensor: Tensor) -> Tensor:
    """A tensor whose last numbers lie beside each other."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _of_weight(weight: Tensor | None) -> int | None:
    address = _pointer(weight)
    if address == 0:
        raise RuntimeError("the storage of a layer's weight is empty; sharded models have to gather weights first")
    return address


def _stride(tensor: Tensor, dim: int) -> int:
    return 0 if tensor.shape[dim] == 1 else tensor.stride(dim)


def _linear(part: Any) -> _Linear:
    weight, bias = part
    return _Linear(_of_weight(weight), _of_weight(bias), weight.shape[1], weight.shape[0])


@cache
def _functions() -> Any:
    functions = library()
    functions.dtem_layer_scratch_bytes.restype = _NUMBER
    functions.dtem_layer.restype = None
    return functions
