"""ViViT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import VivitForVideoClassification, VivitModel

from dtem_hf import BadValue, ToMeConfig, attach
from tests.support.family_case import FamilyCase, Inputs, Row, clips
from tests.support.slow_anatomies import first_token_logits, tubelets, vit_like
from tests.support.slow_model import Outputs
from tests.support.slow_parts import Weights, layer_norm, linear


def embed(root: str) -> Callable[[Weights, Inputs], Tensor]:
    def embedded(weights: Weights, inputs: Inputs) -> Tensor:
        flat = tubelets(weights, root + "embeddings.patch_embeddings.projection", inputs["pixel_values"])
        x = torch.cat([weights[root + "embeddings.cls_token"][0], flat])
        return x + weights[root + "embeddings.position_embeddings"][0]

    return embedded


def head(weights: Weights, x: Tensor, sizes: Tensor) -> Outputs:
    x = layer_norm(weights, "layernorm", x, 1e-6)
    return {"last_hidden_state": x, "pooler_output": linear(weights, "pooler.dense", x[0]).tanh()}


def spelled(fields: dict[str, Any]) -> dict[str, Any]:
    """Clips of 8 frames; patches are 8 pixels wide, and two frames long."""
    return {**fields, "num_frames": 8, "tubelet_size": [2, 8, 8], "hidden_act": "gelu"}


CASE = FamilyCase(
    "vivit",
    encoder=VivitModel,
    rows=(
        Row(
            VivitForVideoClassification,
            vit_like("vivit.", first_token_logits("vivit.layernorm", 1e-6), embed=embed("vivit."), eps=1e-6),
        ),
        Row(VivitModel, vit_like("", head, embed=embed(""), eps=1e-6), "pooler_output", "bare"),
    ),
    inputs=clips,
    spelled=spelled,
)


@pytest.mark.parametrize("size, tokens", [(None, 65), (16, 17), ((16, 32), 33), ((4, 32, 16), 17), ((5, 16, 16), 9)])
def test_tokens_of_a_clip(size: Any, tokens: int) -> None:
    assert attach(CASE.make(VivitModel), ToMeConfig(r=9)).merge_plan(size).num_tokens == tokens


@pytest.mark.parametrize("size", [(1, 32, 32), 7, (4, 32, 32, 32), 0])
def test_a_clip_without_a_token_is_refused(size: Any) -> None:
    with pytest.raises(BadValue, match="image_size="):
        attach(CASE.make(VivitModel), ToMeConfig(r=9)).merge_plan(size)
