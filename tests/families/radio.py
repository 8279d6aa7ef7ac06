"""RADIO: two CLS tokens and three registers; patches through a linear map, normalised inside the model."""

from __future__ import annotations

from dataclasses import replace
from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.radio.modeling_radio import RadioModel

from dtem_hf import ToMeConfig, UnsupportedModelError, attach
from tests.support.family_case import PATCH, FamilyCase, Inputs, Row
from tests.support.slow_anatomies import dinov2_like
from tests.support.slow_model import Outputs
from tests.support.slow_parts import Weights


def spelled(fields: dict[str, Any]) -> dict[str, Any]:
    return {**fields, "max_img_size": fields["image_size"]}


def embed(weights: Weights, inputs: Inputs) -> Tensor:
    mean, std = weights["input_conditioner.norm_mean"], weights["input_conditioner.norm_std"]
    image = (inputs["pixel_values"] - mean) / std
    flat = [
        image[:, i : i + PATCH, j : j + PATCH].flatten()
        for i in range(0, image.shape[1], PATCH)
        for j in range(0, image.shape[2], PATCH)
    ]
    x = torch.stack(flat) @ weights["embeddings.patch_projection.weight"].T
    return torch.cat([weights["embeddings.cls_register_token"], x + weights["embeddings.position_embedding"][0]])


def head(weights: Weights, x: Tensor, sizes: Tensor) -> Outputs:
    return {"last_hidden_state": x, "features": x[5:], "summary": x[:2].flatten()}


CASE = FamilyCase(
    "radio",
    encoder=RadioModel,
    rows=(Row(RadioModel, replace(dinov2_like(""), embed=embed, head=head, prefix=5), "summary"),),
    vision={"mlp_ratio": 2.0, "num_cls_tokens": 2, "num_registers": 3, "summary_idxs": [0, 1]},
    spelled=spelled,
)


def test_packed_images_are_refused() -> None:
    """Tokens of two images would merge."""
    if "image_grid_hw" not in signature(RadioModel.forward).parameters:
        pytest.skip("this transformers packs no images")
    model, grids = attach(CASE.make(RadioModel), ToMeConfig(r=9)), torch.tensor([[8, 8], [4, 4]])
    with pytest.raises(UnsupportedModelError, match="packed images cannot be merged"):
        model(torch.randn(80, 3 * PATCH * PATCH), image_grid_hw=grids)
