"""What the tests of layers that run as one call share: who ran so, and a ViT small enough to run often."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fused_vit import SMALL
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

from dtem_hf.ops import fused_layer


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What every layer that ran as one call was made of, appended as models run."""
    weights: list[Any] = []
    run = fused_layer.run

    def counted(x: Tensor, of_layer: Any, *rest: Any) -> Any:
        weights.append(of_layer)
        return run(x, of_layer, *rest)

    monkeypatch.setattr(fused_layer, "run", counted)
    return weights


@pytest.fixture
def small_vit() -> ViTForImageClassification:
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**SMALL)).eval()


@pytest.fixture
def small_pixels() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
