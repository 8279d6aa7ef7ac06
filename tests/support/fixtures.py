"""Fixtures of the whole suite. `../shared` (oracles and real material) is optional: what needs it skips without it."""

from __future__ import annotations

import csv
import functools
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image


if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported, which transformers does

from torch._export import utils as _export_utils
from torch.onnx._internal.exporter._registration import ONNXRegistry
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil, ViTModel

from tests.support.copies import built_once
from tests.support.hub_client import Client, client_process, hub_environment
from tests.support.loopback_hub import LoopbackHub


ROOT = Path(__file__).resolve().parents[2]


def pytest_configure() -> None:
    """Save what libraries do over and over, which took a third of the time of compilers and exporters."""
    gc.set_threshold(500_000, 20, 20)
    torch._dynamo.config.run_gc_after_compile = False
    ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))
    # Looks up all operators that were registered in C++; none is added later.
    _export_utils._materialize_cpp_cia_ops = functools.cache(_export_utils._materialize_cpp_cia_ops)
    if not torch.cuda.is_available():  # to be seeded later, each kind of device would note the stack of this call
        torch.manual_seed = torch.default_generator.manual_seed


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with oracles and assets beside the repository; tests that ask for it skip where it is absent."""
    folder = ROOT.parent / "shared"
    if not (folder / "oracles" / "reference.npz").is_file():
        pytest.skip("the folder ../shared (oracles and assets) is not here")
    return folder


@pytest.fixture(scope="session")
def oracle(shared: Path) -> dict[str, torch.Tensor]:
    """What the authors' own programs computed, by name: float32, and int64 for positions."""
    with np.load(shared / "oracles" / "reference.npz") as arrays:
        tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    return {name: tensor if tensor.is_floating_point() else tensor.long() for name, tensor in tensors.items()}


@pytest.fixture(scope="session")
def deit_tiny_folder(shared: Path) -> Path:
    """A real ImageNet DeiT-tiny checkpoint."""
    return shared / "assets" / "deit_tiny"


@pytest.fixture(scope="session", autouse=True)
def _one_cpu_thread() -> None:
    """Small models are not worth sharing out: on a busy machine, most of the time goes to waiting for each other."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test draws the same random numbers, alone or among others."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., ViTConfig]:
    """Makes configs of a ViT of 4 layers and 65 tokens, with weights large enough that attention is not flat."""

    def make(**changes: object) -> ViTConfig:
        values = {
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "image_size": 32,
            "patch_size": 4,
            "num_labels": 10,
            "initializer_range": 0.2,
        }
        return ViTConfig(**{**values, **changes})

    return make


def _make(model_class: type, config: Callable[..., ViTConfig], changes: dict[str, object]) -> Any:
    def build() -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return model_class(config(**changes)).eval()

    return built_once((model_class, repr(sorted(changes.items()))), build)


@pytest.fixture(scope="session")
def make_classifier(tiny_config: Callable[..., ViTConfig]) -> Callable[..., ViTForImageClassification]:
    """Makes small classifiers with random weights, the same ones for the same arguments."""

    def make(**changes: object) -> ViTForImageClassification:
        return _make(ViTForImageClassification, tiny_config, changes)

    return make


@pytest.fixture(scope="session")
def make_bare(tiny_config: Callable[..., ViTConfig]) -> Callable[..., ViTModel]:
    """Makes small encoders (with a pooler) with random weights, the same ones for the same arguments."""

    def make(**changes: object) -> ViTModel:
        return _make(ViTModel, tiny_config, changes)

    return make


@pytest.fixture(scope="session")
def pixels() -> torch.Tensor:
    """Three images for the small models: [3, 3, 32, 32]."""
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def _save_vit(folder: Path, num_layers: int) -> Path:
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=32,
        num_hidden_layers=num_layers,
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
def vit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT with random weights and its processor: 32×32 pixels, 17 tokens of 4 layers."""
    return _save_vit(tmp_path_factory.mktemp("vit"), 4)


@pytest.fixture(scope="session")
def shallow_vit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with 2 layers, for what exports and compiles: the second layer sees tokens that are merged."""
    return _save_vit(tmp_path_factory.mktemp("shallow"), 2)


@pytest.fixture(scope="session")
def one_layer_vit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with 1 layer, where what is around an exported graph counts, and not what is in it."""
    return _save_vit(tmp_path_factory.mktemp("one"), 1)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
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
def any_precision() -> Iterator[None]:
    """Runs in this process may ask for any mixed precision, and later ones do not take theirs over."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.fixture(scope="session")
def _hub_server() -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture
def hub(_hub_server: LoopbackHub) -> LoopbackHub:
    """A Hub on this machine, on which nothing has happened yet."""
    _hub_server.clear()
    return _hub_server


@pytest.fixture(scope="session")
def client(_hub_server: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """Calls functions in a process that knows the loopback Hub, and no token."""
    with client_process(hub_environment(_hub_server.endpoint, tmp_path_factory.mktemp("home"))) as call:
        yield call
