"""The peers of the benchmark compute what they say: a plain ViT, or one that drops tokens, by either library."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(Path(__file__).resolve().parents[2]), *sys.path])
    from recipes import peers

    return peers


@torch.no_grad()
def test_peers_compute_a_vit(peers: Any) -> None:
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
    rows: list[int] = []
    model.vit.layers[-1].layernorm_after.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[1]))
    for peer in (peers.sliced(model, 0), peers.plain_by_onednn(model, 16)):
        torch.testing.assert_close(peer(pixels), plain, atol=1e-5, rtol=1e-5)
    dropped = peers.sliced(model, 16)(pixels)
    assert rows == [145, 145, 145 - 3 * 16] and not torch.allclose(dropped, plain, atol=1e-4)
    torch.testing.assert_close(peers.sliced_by_onednn(model, 16)(pixels), dropped, atol=1e-5, rtol=1e-5)
