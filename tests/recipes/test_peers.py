"""The peers of the benchmark compute what they say: a ViT that drops tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import VideoMAEConfig, VideoMAEForVideoClassification, ViTConfig, ViTForImageClassification

from recipes import peers


@pytest.fixture
def model() -> Any:
    config = ViTConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=6,
        image_size=48,
        patch_size=4,
    )
    return ViTForImageClassification(config).eval()


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_tokens_are_dropped_for_nothing(model: Any, pixels: Tensor) -> None:
    plain = model(pixels).logits
    rows: list[int] = []
    model.vit.layers[-1].layernorm_after.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[1]))
    torch.testing.assert_close(peers.sliced(model, 0)(pixels), plain, atol=1e-5, rtol=1e-5)
    dropped = peers.sliced(model, 16)(pixels)
    assert rows == [145, 145 - 3 * 16] and not torch.allclose(dropped, plain, atol=1e-5)
    model.config.hidden_act = "relu"
    with pytest.raises(RuntimeError, match="written for 'gelu'"):
        peers.sliced(model, 16)


@torch.no_grad()
def test_transformers_own_layers_drop_the_same_tokens(model: Any, pixels: Tensor) -> None:
    expected = [peers.sliced(model, r)(pixels) for r in (0, 16, 100)]
    for r, logits in zip((0, 16, 100), expected, strict=True):
        torch.testing.assert_close(peers.sliced_layers(model, r)(pixels), logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_tokens_of_a_video_are_dropped_for_nothing() -> None:
    config = VideoMAEConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        num_frames=4,
    )
    model = VideoMAEForVideoClassification(config).eval()
    clips = torch.randn(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    plain = model(clips).logits
    rows: list[int] = []
    model.videomae.encoder.layer[-1].layernorm_after.register_forward_hook(
        lambda _, inputs, __: rows.append(inputs[0].shape[1])
    )
    torch.testing.assert_close(peers.sliced_video(model, 0)(clips), plain, atol=1e-5, rtol=1e-5)
    peers.sliced_video(model, 6)(clips)
    assert rows == [32, 32 - 4 * 6]
