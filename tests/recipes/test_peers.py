"""The peers of the benchmark compute what they say: a plain ViT, or one that drops tokens, by either library."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from dtem_hf.ops import products


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(Path(__file__).resolve().parents[2]), *sys.path])
    from recipes import peers

    return peers


@torch.no_grad()
def test_peers_compute_a_vit(peers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ViTConfig(
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=3,
        num_attention_heads=6,
        image_size=48,
        patch_size=4,
    )
    model = ViTForImageClassification(config).eval()
    pixels = torch.randn(2, 3, 48, 48)
    plain = model(pixels).logits
    weights: list[Any] = []
    multiply = products.multiply
    monkeypatch.setattr(products, "multiply", lambda *args: (weights.append(args[1]), multiply(*args))[1])
    monkeypatch.setattr(products, "is_available", lambda: True)  # on any processor
    rows: list[int] = []
    model.vit.layers[-1].layernorm_after.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[1]))
    torch.testing.assert_close(peers.sliced(model, 0)(pixels), plain, atol=1e-5, rtol=1e-5)
    assert not weights
    torch.testing.assert_close(peers.plain_by_onednn(model, 16)(pixels), plain, atol=1e-5, rtol=1e-5)
    assert len(weights) == 3 * 6
    dropped = peers.sliced(model, 16)(pixels)
    assert rows == [145, 145, 145 - 3 * 16] and not torch.allclose(dropped, plain, atol=1e-4)
    torch.testing.assert_close(peers.sliced_by_onednn(model, 16)(pixels), dropped, atol=1e-5, rtol=1e-5)
    assert len(weights) == 2 * 3 * 6
    monkeypatch.setattr(products, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="leave this peer out"):
        peers.plain_by_onednn(model, 16)
