"""A small model, its config and an adapter, as folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import ViTForImageClassification, ViTImageProcessorPil

from dtem_hf import DTEMConfig, MergeAdapter
from dtem_hf.hub.facts import BackboneFacts
from tests.support.command_line import TINY


@pytest.fixture
def config_folder(tmp_path: Path) -> Path:
    """A model's config, and no weights."""
    TINY.save_pretrained(tmp_path / "config")
    return tmp_path / "config"


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A whole checkpoint, with its image processor."""
    ViTForImageClassification(TINY).save_pretrained(tmp_path / "model")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def adapter_folder(tmp_path: Path) -> Path:
    """An adapter of width 4 for a backbone of 2 layers of width 16."""
    tensors = {f"layers.{i}.weight": torch.ones(4, 16) for i in range(2)}
    tensors |= {f"layers.{i}.bias": torch.zeros(4) for i in range(2)}
    backbone = BackboneFacts("vit", num_layers=2, hidden_size=16, base_model="user/tiny")
    MergeAdapter(DTEMConfig(r=3, init="random", embed_dim=4), tensors, backbone).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"
