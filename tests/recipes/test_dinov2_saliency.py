"""The saliency head of the recipe computes what torch's own layers do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from recipes import dinov2_saliency


@torch.no_grad()
def test_the_head_is_three_transposed_convolutions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    layers: list[nn.Module] = []
    tensors = {}
    for i, (inner, outer) in enumerate(((8, 6), (6, 5), (5, 4)), start=1):
        up, norm = nn.ConvTranspose2d(inner, outer, 4, stride=2, padding=1), nn.BatchNorm2d(outer)
        for value in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
            assert value is not None
            value.uniform_(0.5, 1.5)
        tensors |= {f"upconv{i}.{name}": value for name, value in up.state_dict().items()}
        tensors |= {f"bn{i}.{name}": value for name, value in norm.state_dict().items()}
        layers += [up, norm, nn.ReLU()]
    last = nn.Conv2d(4, 1, 1)
    tensors |= {f"final_conv.{name}": value for name, value in last.state_dict().items()}
    save_file(tensors, tmp_path / "decoder.safetensors")
    monkeypatch.setenv("DINOV2_SALIENCY", str(tmp_path))
    dinov2_saliency._decoder.cache_clear()

    patches = torch.randn(2, 8, 16, 16)
    head = nn.Sequential(*layers, last, nn.Upsample((224, 224), mode="bilinear"), nn.Sigmoid()).eval()
    maps = dinov2_saliency.saliency(patches)
    dinov2_saliency._decoder.cache_clear()
    assert maps.shape == (2, 1, 224, 224)
    torch.testing.assert_close(maps, head(patches), atol=1e-6, rtol=1e-5)
