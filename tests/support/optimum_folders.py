"""Small models exported for tests/deploy/optimum_loads.py, with what they should say.

python -m tests.support.optimum_folders DIR
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    ViTModel,
)

from dtem_hf import ToMeConfig, attach
from dtem_hf.deploy.graph import ImageGraph, output_names
from dtem_hf.deploy.program import ExportArguments, export_format
from dtem_hf.opening import load_processor


SIZES = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "initializer_range": 0.2,
}


def write(folder: Path) -> None:
    """One folder for each model: the export, a picture, its pixels, and eager's outputs for them."""
    torch.manual_seed(0)
    models = {
        "classifier": ViTForImageClassification(ViTConfig(**SIZES, num_labels=5)),
        "encoder": ViTModel(ViTConfig(**SIZES)),
        "clip": CLIPVisionModelWithProjection(CLIPVisionConfig(**SIZES, projection_dim=16)),
        "dense": Dinov2Model(Dinov2Config(**{k: v for k, v in SIZES.items() if k != "intermediate_size"})),
    }
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    for name, model in models.items():
        plain, out = folder / name / "plain", folder / name / "exported"
        model.save_pretrained(plain)
        size, crop = {"shortest_edge": 36}, {"height": 32, "width": 32}
        ViTImageProcessorPil(size=size, crop_size=crop, do_center_crop=True).save_pretrained(plain)
        merged = attach(model.eval(), ToMeConfig(r=3, unmerge=True if name == "dense" else None))
        arguments = ExportArguments(model=str(plain), output_dir=str(out), device="cpu")
        for kind in ("onnx", "openvino"):
            export_format(arguments, merged, kind, torch.device("cpu"))
        pixels = load_processor(str(plain))(picture, return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            values = dict(zip(output_names(merged, pixels), ImageGraph(merged)(pixels), strict=True))
        np.savez(out / "expected.npz", pixels=pixels, **{key: value.numpy() for key, value in values.items()})
        picture.save(out / "picture.png")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
