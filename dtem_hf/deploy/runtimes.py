"""The runtimes of benchmarks and evaluations: eager, torch.compile, ONNX Runtime and OpenVINO."""

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


# A function of pixels [B, C, H, W] on the model's device.
Run = Callable[[Tensor], Any]

# onnxruntime_one_hot runs graphs that merge by one-hot products instead of a scatter.
RUNTIMES = ("eager", "compile", "onnxruntime", "onnxruntime_one_hot", "openvino", "openvino_bfloat16")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def is_exported(runtime: str) -> bool:
    """Whether a runtime runs an exported graph, whose pixels and outputs are float32."""
    return runtime.startswith(("onnxruntime", "openvino"))


def need_runtime(runtime: str) -> None:
    """Raise ImportError, with the command to install, if packages of a runtime are missing."""
    if is_exported(runtime):
        need("openvino" if runtime.startswith("openvino") else "onnx", f"runtime {runtime}")


def check_runtime(arguments: Any, *runtimes: str) -> None:
    """Raise ValueError that names `dtype` if one of the runtimes does not compute in it."""
    if arguments.dtype != "float32" and any(name.startswith("openvino") for name in runtimes):
        raise BadValue(
            "dtype", arguments.dtype, "float32 with OpenVINO; the runtime openvino_bfloat16 rounds a float32 model"
        )
    if arguments.dtype == "bfloat16" and any(map(is_exported, runtimes)) and arguments.device == "cpu":
        raise BadValue("dtype", arguments.dtype, "float32 or float16 with the runtime onnxruntime on a CPU")


def make_run(
    runtime: str,
    model: nn.Module,
    shape: tuple[int, ...],
    compile_mode: str = "default",
) -> Run:
    """Make a function that runs a model in a runtime, on images of [C, H, W] in batches of any size.

    An exported graph takes float32 pixels and returns a list of tensors. `model` may also be an ImageGraph. Raises
    ImportError if packages of the runtime are missing, and ValueError that names `dtype` or `device` if the runtime
    has no kernels for it.
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
