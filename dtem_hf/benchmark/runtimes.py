"""The runtimes of a benchmark: eager, torch.compile, ONNX Runtime, or a function that the user names."""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..deploy.graph import ImageGraph, export_graph, output_names
from ..deploy.onnx_runtime import OnnxRunner, need_onnx, write_onnx
from ..errors import BadValue
from ..models.vision import run_on_pixels


# Pixels [B, C, H, W] on the model's device -> anything.
Run = Callable[[Tensor], Any]

# The second form of ONNX Runtime runs graphs that merge by one-hot products instead of a scatter.
RUNTIMES = ("eager", "compile", "onnxruntime", "onnxruntime_one_hot")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def make_run(
    runtime: str,
    model: nn.Module,
    shape: tuple[int, ...],
    compile_mode: str = "default",
) -> Run:
    """Make a model ready to run on images of [C, H, W] in batches of any size; ONNX Runtime takes float32 pixels.

    Raises ImportError without the ONNX packages, and ValueError naming `dtype` or `device` where onnxruntime has no
    kernels for them.
    """
    if runtime == "eager":
        return partial(run_on_pixels, model)
    if runtime == "compile":
        return torch.compile(ImageGraph(model), fullgraph=True, dynamic=True, mode=compile_mode)
    need_onnx("onnx", "onnxscript", "onnxruntime")
    parameter = next(model.parameters())
    implementation = model.config._attn_implementation  # type: ignore[union-attr]
    model.set_attn_implementation("eager")  # type: ignore[operator] # the shorter graph
    try:
        with ops.merge_form("one_hot" if runtime.endswith("one_hot") else "scatter"):
            program = export_graph(model, shape)
        names = output_names(model, torch.zeros(1, *shape, device=parameter.device))
    finally:
        model.set_attn_implementation(implementation)  # type: ignore[operator]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        write_onnx(program, path, names)
        return OnnxRunner(path, parameter.device, str(parameter.dtype).removeprefix("torch."))


@contextmanager
def room_for_graphs(count: int) -> Iterator[None]:
    """Let torch.compile keep so many graphs of the same code: each row has one, and another for a batch of one."""
    with torch._dynamo.config.patch(
        recompile_limit=max(2 * count, torch._dynamo.config.recompile_limit),
        accumulated_recompile_limit=max(2 * count, torch._dynamo.config.accumulated_recompile_limit),
    ):
        yield


def load_peer(name: str) -> Callable[..., Any]:
    """The function that `module:function` names; the module is looked for in the current folder, too.

    It is called as `function(model, r)` with the r of one row and a plain transformers model (a copy that shares its
    weights, in eval mode, on the measured device and in the measured dtype), and returns a callable that takes pixels
    [B, C, H, W] of the same device and dtype. Raises ValueError that says which part of the name is wrong.
    """
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise BadValue("peer", name, "module:function")
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises
        raise BadValue(
            "peer", name, f"a module that can be imported; {module_name}: {type(error).__name__}: {error}"
        ) from error
    finally:
        if added:
            sys.path.remove(here)
    function = getattr(module, function_name, None)
    if not callable(function):
        offered = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise BadValue("peer", name, f"a function of {module_name}, which has {', '.join(offered) or 'none'}")
    return function


def peer_run(name: str, model: nn.Module, r: Any) -> Run:
    """The callable that a peer returns for a model and an r. Raises ValueError where it is not callable."""
    run = load_peer(name)(model, r)
    if not callable(run):
        raise BadValue("peer", name, f"a function that returns a callable, not {type(run).__name__}")
    return run
