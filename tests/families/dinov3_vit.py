"""DINOv3: registers, and rotary positions that depend on the shape of the image."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import DINOv3ViTBackbone, DINOv3ViTModel

from dtem_hf import ToMeConfig, UnsupportedModelError, attach
from tests.support.family_case import FamilyCase, Row, images
from tests.support.slow_anatomies import centres, dinov2_like, patches
from tests.support.slow_model import Anatomy, Inputs, Outputs
from tests.support.slow_parts import Weights, layer_norm


def dinov3(registers: int) -> Anatomy:
    def embed(weights: Weights, inputs: Inputs) -> Tensor:
        flat = patches(weights, "embeddings.patch_embeddings", inputs["pixel_values"])
        return torch.cat([weights["embeddings.cls_token"][0], weights["embeddings.register_tokens"][0], flat])

    def head(weights: Weights, x: Tensor, sizes: Tensor) -> Outputs:
        x = layer_norm(weights, "norm", x, 1e-5)
        return {"last_hidden_state": x, "pooler_output": x[0]}

    return replace(
        dinov2_like("", registers),
        embed=embed,
        head=head,
        layer="model.layer.{}.",
        mlp=("mlp.up_proj", "mlp.down_proj"),
        eps=1e-5,
        theta=100.0,
        places=centres,
    )


CASE = FamilyCase(
    "dinov3_vit",
    encoder=DINOv3ViTModel,
    rows=(Row(DINOv3ViTModel, dinov3(4), "pooler_output"),),
    others=(DINOv3ViTBackbone,),
    vision={"num_register_tokens": 4},
    uneven=lambda count: images(count, 20, 28),
)


def test_narrow_heads_are_refused() -> None:
    """Positions are read off rotations, of which a head of four numbers has one only."""
    with pytest.raises(
        UnsupportedModelError, match="head width 4: positions can be computed from rotations from 8 on"
    ):
        attach(CASE.make(DINOv3ViTModel, num_attention_heads=8), ToMeConfig(r=9))
