"""Matching and merging of a few images on a CPU, in one call of compiled C.

For one image they are a few microseconds of arithmetic, and as tensor operations twenty times as much. The C beside
this file is compiled once by the machine's own compiler (`cc`, or $CC) and kept in the user's cache folder, as Triton
keeps its kernels. Where there is no compiler, and with DTEM_HF_NATIVE=0 in the environment, the plain path runs, which
is the reference, and what larger batches, other dtypes and gradients take anyway.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from functools import cache, lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from .matching import Matching, split_counts
from .merging import Merged
from .recording import is_recorded


# What it computes in.
DTYPE = torch.float32
_SOURCE = Path(__file__).with_suffix(".c")
# One call runs on one thread: with more images, all threads of the plain path are faster.
_MOST_IMAGES_PER_THREAD = 2
_FLAGS = ("-O3", "-fno-math-errno", "-shared", "-fPIC")
_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_int64
_ARGUMENTS = (
    *(_POINTER, _NUMBER, _NUMBER, _NUMBER, _NUMBER),
    *(_POINTER, _NUMBER, _NUMBER, _NUMBER),
    *(_POINTER, _NUMBER, _NUMBER, _NUMBER, _NUMBER, _NUMBER),
    *(_POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER),
)


def can_match_and_merge(x: Tensor, sizes: Tensor | None, metric: Tensor) -> bool:
    """Whether `match_and_merge` runs on tokens, and is the faster way."""
    return (
        type(x) is Tensor
        and type(metric) is Tensor
        and x.is_cpu
        and metric.is_cpu
        and x.dtype == metric.dtype == DTYPE
        and not is_recorded()
        and x.shape[0] <= _MOST_IMAGES_PER_THREAD * torch.get_num_threads()
        and not (torch.is_grad_enabled() and _any_requires_grad(x, sizes, metric))
        and x.stride(-1) == metric.stride(-1) == 1
        and (sizes is None or (sizes.stride(-1) == 1 and sizes.dtype == DTYPE and sizes.is_cpu))
        and library() is not None
    )


def match_and_merge(
    x: Tensor, sizes: Tensor | None, metric: Tensor, heads: int, r: int, num_prefix_tokens: int
) -> Merged:
    """Match by a metric [B, N, H · d], whose heads are added up, and merge: x [B, N, D], sizes [B, N] or None.

    Returns x [B, N - r, D], sizes [B, N - r], the bias of these sizes and what makes the matching; r is one that fits.
    """
    batch, num_tokens, width = x.shape
    dim = metric.shape[-1] // heads
    left, num_a = num_tokens - r, split_counts(num_tokens, num_prefix_tokens)[0]
    out, out_sizes, bias = x.new_empty(batch, left, width), x.new_empty(batch, left), x.new_empty(batch, 1, 1, left)
    # Few ever ask for the matching, so its three tensors are cut out of one when they do.
    indices = torch.empty(batch * (r + num_a), dtype=torch.int64)
    scratch = torch.empty(_scratch_bytes(num_tokens, dim), dtype=torch.uint8)
    first = indices.data_ptr()
    second = first + 8 * batch * r
    library().dtem_match_and_merge(
        *(metric.data_ptr(), metric.stride(0), metric.stride(1), heads, dim),
        *(x.data_ptr(), x.stride(0), x.stride(1), width),
        *((None, 0) if sizes is None else (sizes.data_ptr(), sizes.stride(0))),
        *(batch, num_tokens, num_prefix_tokens, r),
        *(out.data_ptr(), out_sizes.data_ptr(), bias.data_ptr()),
        *(first, second, second + 8 * batch * r, scratch.data_ptr()),
    )

    def matching() -> Matching:
        merged, target, kept = indices.split([batch * r, batch * r, batch * (num_a - r)])
        rows = batch, r
        return Matching(merged.view(rows), target.view(rows), kept.view(batch, num_a - r), num_prefix_tokens)

    return Merged(out, out_sizes, matching, bias)


@lru_cache(maxsize=1024)
def _scratch_bytes(num_tokens: int, dim: int) -> int:
    return int(library().dtem_scratch_bytes(num_tokens, dim))


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


@cache
def library() -> Any:
    """The compiled C, or None where it cannot be had. Compiled at the first call, and loaded once for a process."""
    if os.environ.get("DTEM_HF_NATIVE") == "0" or sys.platform == "win32":
        return None
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if compiler is None:
        return None
    try:
        loaded = _load(compiler)
    except (OSError, subprocess.SubprocessError, AttributeError):
        return None
    loaded.dtem_scratch_bytes.restype, loaded.dtem_scratch_bytes.argtypes = _NUMBER, (_NUMBER, _NUMBER)
    loaded.dtem_match_and_merge.restype, loaded.dtem_match_and_merge.argtypes = None, _ARGUMENTS
    return loaded


def _load(compiler: str) -> ctypes.CDLL:
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=30).stdout
    digest = hashlib.sha256(b"\0".join([_SOURCE.read_bytes(), version, repr(_FLAGS).encode()])).hexdigest()
    folder = _cache_folder()
    if folder is not None:
        path = folder / f"native-{digest[:32]}.so"
        try:
            return ctypes.CDLL(str(path))
        except OSError:  # it is not there yet, or spoilt
            with TemporaryDirectory(dir=folder) as temporary:
                os.replace(_compile(compiler, Path(temporary)), path)
            return ctypes.CDLL(str(path))
    with TemporaryDirectory() as temporary:  # a loaded library no longer needs its file
        return ctypes.CDLL(str(_compile(compiler, Path(temporary))))


def _compile(compiler: str, folder: Path) -> Path:
    built = folder / "native.so"
    command = [compiler, *_FLAGS, str(_SOURCE), "-o", str(built), "-lm"]
    subprocess.run(command, capture_output=True, check=True, timeout=120)
    return built


def _cache_folder() -> Path | None:
    """A folder of the user's own, which nobody else can put a library into; None where there is none."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(base) / "dtem_hf"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError:
        return None
    own = status.st_uid == os.getuid() and not status.st_mode & 0o022
    return folder if own and os.access(folder, os.W_OK) else None
