"""A small model and a folder of images on disk, as the training program takes them."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil


@pytest.fixture(scope="session")
def vit_folder(tmp_path_factory):
    """A ViT with random weights and its processor: 32×32 pixels, 17 tokens of 4 layers."""
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=5,
        hidden_dropout_prob=0.1,
        initializer_range=0.2,
    )
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """48 small images of noise with a labels.csv; every third has no label."""
    folder = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    with open(folder / "labels.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "label"])
        for i in range(48):
            coarse = draw.integers(0, 256, size=(4, 4, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((40, 36)).save(folder / f"{i}.png")
            writer.writerow([f"{i}.png", "" if i % 3 == 0 else i % 5])
    return folder


@pytest.fixture
def options(vit_folder, image_folder, tmp_path):
    """Arguments of a run of a few steps."""
    return {
        "model": str(vit_folder),
        "data": str(image_folder),
        "output_dir": str(tmp_path / "run"),
        "r": "2",
        "steps": 6,
        "batch_size": 4,
        "validation_size": 8,
        "validate_every": 3,
        "checkpoint_every": 2,
        "num_workers": 0,
        "lr": 0.01,
    }
