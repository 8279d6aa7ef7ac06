"""OpenVINO: write a graph as .xml and .bin files, quantise it with NNCF, and run it on a CPU."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram

from ..errors import BadValue
from .graph import INPUT_NAME
from .onnx_runtime import write_onnx


# OpenVINO's dtypes: their names in hints, and in the list of a processor's capabilities.
_PRECISIONS = {"float32": ("f32", "FP32"), "bfloat16": ("bf16", "BF16"), "float16": ("f16", "FP16")}


def write_openvino(
    program: ExportedProgram,
    path: Path,
    names: list[str],
    half_weights: bool = False,
    images: Sequence[Tensor] = (),
) -> list[Path]:
    """Write a graph as OpenVINO's .xml, with the weights in a .bin beside it, in float16 with `half_weights`.

    With `images`, batches of pixels [B, C, H, W] for calibration, NNCF quantises weights and activations to int8. The
    graph is converted by way of ONNX, so that both runtimes get the same graph. Returns both files.
    """
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        write_onnx(program, Path(folder, "model.onnx"), names)
        model = openvino.convert_model(Path(folder, "model.onnx"))
    if images:
        import nncf

        batches = [pixels.numpy() for pixels in images]
        model = nncf.quantize(
            model, nncf.Dataset(batches), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(batches)
        )
    openvino.save_model(model, path, compress_to_fp16=half_weights)
    return [path, path.with_suffix(".bin")]


class OpenVinoRunner:
    """Runs an OpenVINO file: pixels [B, C, H, W] -> tensors, on the CPU, with as many threads as torch.

    OpenVINO computes in `dtype`; in an int8 graph, this holds for all that is not quantised. The graph is compiled
    once for each shape of pixels, because a graph for any shape is slower. Raises ValueError that names an unsupported
    `dtype` or `device`.
    """

    def __init__(self, path: Path, device: torch.device, dtype: str = "float32") -> None:
        import openvino

        self._core = openvino.Core()
        if device.type != "cpu":
            raise BadValue("device", device.type, "cpu with OpenVINO")
        able = self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        known = [name for name, (_, capability) in _PRECISIONS.items() if capability in able]
        if dtype not in known:
            raise BadValue("dtype", dtype, f"{' or '.join(known)} with OpenVINO on this processor")
        self._model = self._core.read_model(path)
        self._settings = {
            "INFERENCE_PRECISION_HINT": _PRECISIONS[dtype][0],
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        self._requests: dict[tuple[int, ...], Any] = {}

    def __call__(self, pixel_values: Tensor) -> list[Tensor]:
        shape = tuple(pixel_values.shape)
        if shape not in self._requests:
            model = self._model.clone()
            model.reshape({INPUT_NAME: list(shape)})
            compiled = self._core.compile_model(model, "CPU", self._settings)
            self._requests[shape] = compiled.create_infer_request()
        found = self._requests[shape].infer({0: np.ascontiguousarray(pixel_values.numpy())}, share_inputs=True)
        return [torch.from_numpy(value) for value in found.values()]
