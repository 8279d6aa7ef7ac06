"""The peers of the benchmark compute what they say: a ViT with layers as one call, and one that drops tokens."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

from dtem_hf.ops import fused_layer


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(Path(__file__).resolve().parents[2]), *sys.path])
    from recipes import peers

    return peers


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
def test_tokens_are_dropped_for_nothing(peers: Any, model: Any, pixels: Tensor) -> None:
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
@pytest.mark.skipif(not fused_layer.is_available(), reason="needs a C compiler, wide vectors and OpenMP")
def test_a_plain_model_by_the_calls_of_a_merged_one(
    peers: Any, model: Any, pixels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = model(pixels).logits
    shapes: list[Any] = []
    run = fused_layer.run
    monkeypatch.setattr(
        fused_layer, "run", lambda x, *args, **kwargs: (shapes.append(x.shape[1]), run(x, *args, **kwargs))[1]
    )
    torch.testing.assert_close(peers.plain_fused(model, 16)(pixels), plain, atol=1e-5, rtol=1e-5)
    assert shapes == [145] * 3
    monkeypatch.setattr(fused_layer, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="leave this peer out"):
        peers.plain_fused(model, 16)
