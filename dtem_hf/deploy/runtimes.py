"""The runtimes of a benchmark or an evaluation: eager, torch.compile, ONNX Runtime and OpenVINO."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import BadValue, need
from ..models.vision import run_on_pixels
from .graph import ImageGraph, attention_as, export_graph, output_names
from .onnx_runtime import OnnxRunner, write_onnx
from .openvino_runtime import OpenVinoRunner, write_openvino


# Pixels [B, C, H, W] on the model's device -> anything.
Run = Callable[[Tensor], Any]

# The second form of ONNX Runtime runs graphs that merge by one-hot products instead of a scatter.
RUNTIMES = ("eager", "compile", "onnxruntime", "onnxruntime_one_hot", "openvino", "openvino_bfloat16")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def is_exported(runtime: str) -> bool:
    """Whether a runtime runs an exported graph, whose pixels and outputs are float32."""
    return runtime.startswith(("onnxruntime", "openvino"))


def need_runtime(runtime: str) -> None:
    """Raise ImportError that names the line which installs what a runtime lacks."""
    if is_exported(runtime):
        need("openvino" if runtime.startswith("openvino") else "onnx", f"runtime {runtime}")


def check_runtime(arguments: Any, *runtimes: str) -> None:
    """Raise ValueError naming `dtype` where a runtime that is asked for does not compute in it."""
    if arguments.dtype != "float32" and any(name.startswith("openvino") for name in runtimes):
        raise BadValue(
            "dtype", arguments.dtype, "float32 with OpenVINO; the runtime openvino_bfloat16 rounds by itself"
        )
    if arguments.dtype == "bfloat16" and any(map(is_exported, runtimes)) and arguments.device == "cpu":
        raise BadValue("dtype", arguments.dtype, "float32 or float16 with the runtime onnxruntime on a CPU")


def make_run(
    runtime: str,
    model: nn.Module,
    shape: tuple[int, ...],
    compile_mode: str = "default",
) -> Run:
    """Make a model ready to run on images of [C, H, W] in batches of any size; exported graphs take float32 pixels.

    Of an exported graph the run returns a list of tensors. `model` may be an ImageGraph, which is then run itself.
    Raises ImportError without the packages of a runtime, and ValueError naming `dtype` or `device` where the runtime
    has no kernels for them.
    """
    graph = model if isinstance(model, ImageGraph) else None
    if runtime == "eager":
        return graph or partial(run_on_pixels, model)
    if runtime == "compile":
        return torch.compile(graph or ImageGraph(model), fullgraph=True, dynamic=True, mode=compile_mode)
    need_runtime(runtime)
    parameter = next(model.parameters())
    form = {"onnxruntime": "scatter", "onnxruntime_one_hot": "one_hot"}.get(runtime, "openvino")
    with ops.merge_form(form), attention_as(model, "eager"):
        program = export_graph(model, shape)
        names = ["output"] if graph else output_names(model, torch.zeros(1, *shape, device=parameter.device))
    with tempfile.TemporaryDirectory() as folder:
        if runtime.startswith("openvino"):
            path = Path(folder, "model.xml")
            write_openvino(program, path, names)
            precision = "bfloat16" if runtime.endswith("bfloat16") else "float32"
            return OpenVinoRunner(path, parameter.device, precision)
        path = Path(folder, "model.onnx")
        write_onnx(program, path, names)
        return OnnxRunner(path, parameter.device, str(parameter.dtype).removeprefix("torch."))
