"""ONNX: write a graph as a file, quantise it, and run it in ONNX Runtime."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram

from ..errors import BadValue, need
from .graph import INPUT_NAME


# 20 is the first opset with a GELU operator, which ONNX Runtime (1.17 and later) fuses; without it, every MLP needs
# four more passes over its activations. torch's exporter writes 18 or more.
OPSET = 20
LOWEST_OPSET = 18


def write_onnx(program: ExportedProgram, path: Path, names: list[str], opset: int = OPSET) -> list[Path]:
    """Write a graph as an ONNX file; more than 1 GiB of weights go to a second file beside it. Returns the files."""
    # Hide warnings about torchvision's operators: no graph here has them.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        # torch's exporter itself uses a deprecated check.
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        torch.onnx.export(
            program,
            f=path,
            input_names=[INPUT_NAME],
            output_names=names,
            opset_version=opset,
            # A protocol buffer holds at most 2 GiB.
            external_data=_weight_bytes(program) > 1 << 30,
            dynamo=True,
            verbose=False,
        )
    beside = path.with_name(f"{path.name}.data")
    return [path, *([beside] if beside.is_file() else [])]


def check_opset(opset: int) -> None:
    """Raise ValueError for an opset that torch's exporter cannot write; it converts graphs with onnxscript."""
    need("onnx", "a graph in ONNX", "onnx", "onnxscript")
    from onnx import helper
    from onnxscript.version_converter import convert_version

    graph, lowest = helper.make_graph([], "empty", [], []), helper.make_opsetid("", LOWEST_OPSET)
    try:
        convert_version(helper.make_model(graph, opset_imports=[lowest]), opset)
    except ValueError as error:
        raise BadValue("opset", opset, f"one that onnxscript writes ({error})") from error


def quantise_onnx(path: Path, images: Sequence[Tensor]) -> None:
    """Quantise the linear layers of an ONNX file to int8 with ONNX Runtime, weights per output channel, in place.

    `images`, batches of pixels [B, C, H, W], calibrate the ranges of activations. Products of two activations
    (attention and merging) stay in float32.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rest = iter(images)

        def get_next(self) -> dict[str, Any] | None:
            pixels = next(self.rest, None)
            return None if pixels is None else {INPUT_NAME: pixels.numpy()}

    graph = onnx.load(str(path), load_external_data=False).graph
    weights = {initializer.name for initializer in graph.initializer}
    kinds = ["Gemm", "MatMul"]
    linear = [node.name for node in graph.node if node.op_type in kinds and weights.intersection(node.input)]
    quantize_static(
        str(path),
        str(path),
        Reader(),
        op_types_to_quantize=kinds,
        nodes_to_quantize=linear,
        per_channel=True,
        weight_type=QuantType.QInt8,
    )


def written_opset(path: Path) -> int:
    """The opset of an ONNX file."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    return next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))


class OnnxRunner:
    """Runs an ONNX file in ONNX Runtime: pixels [B, C, H, W] -> tensors, on the CPU or, with onnxruntime-gpu, on CUDA.

    It uses as many threads as torch. Raises ValueError that names `dtype` or `device` if the runtime lacks kernels for
    it.
    """

    def __init__(self, path: Path, device: torch.device, dtype: str = "float32") -> None:
        need("onnx", "ONNX Runtime", "onnxruntime")
        import onnxruntime

        provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}.get(device.type)
        if provider not in onnxruntime.get_available_providers():
            raise BadValue(
                "device", device.type, f"this onnxruntime runs on {', '.join(onnxruntime.get_available_providers())}"
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        # No spinning threads: they would take the cores from the next runtime of a benchmark.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        errors = onnxruntime.capi.onnxruntime_pybind11_state
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
        except (errors.NotImplemented, errors.InvalidGraph) as error:
            reason = str(error).rsplit(":", 1)[-1].strip()
            raise BadValue(
                "dtype", dtype, f"float32 or float16; onnxruntime's {provider} cannot run this ({reason})"
            ) from error
        self.device = device

    def __call__(self, pixel_values: Tensor) -> list[Tensor]:
        if self.device.type == "cpu":
            found = self.session.run(None, {INPUT_NAME: pixel_values.numpy()})
            return [torch.from_numpy(value) for value in found]
        binding = self.session.io_binding()
        pixels = pixel_values.contiguous()
        binding.bind_input(
            INPUT_NAME, self.device.type, self.device.index or 0, np.float32, tuple(pixels.shape), pixels.data_ptr()
        )
        for output in self.session.get_outputs():
            binding.bind_output(output.name, self.device.type, self.device.index or 0)
        self.session.run_with_iobinding(binding)
        return [torch.utils.dlpack.from_dlpack(value._ortvalue.to_dlpack()) for value in binding.get_outputs()]


def _weight_bytes(program: ExportedProgram) -> int:
    tensors: list[Any] = [*program.state_dict.values(), *program.constants.values()]
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
