"""BEiT: a bias by relative position, layer scale, a classifier on the mean of the patches."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor
from transformers import BeitBackbone, BeitForImageClassification, BeitForSemanticSegmentation, BeitModel

from tests.support.family_case import FamilyCase, Row
from tests.support.slow_anatomies import BIASES, RELATIVE_TABLE, SDPA_ONNX, beit_like
from tests.support.slow_model import Anatomy
from tests.support.unmerging import METHODS, assert_segmentation_sees_the_grid, assert_segmentation_trains


def beit(*tables: str, **changes: Any) -> Anatomy:
    return beit_like("beit.", tables=tuple("beit." + name for name in tables), **changes)


OWN, SHARED = "layers.{}." + RELATIVE_TABLE, "shared_position_bias.relative_position_bias_table"
CASE = FamilyCase(
    "beit",
    encoder=BeitModel,
    rows=(
        Row(BeitForImageClassification, beit(OWN), variant="relative", vision=BIASES["relative"]),
        Row(BeitForImageClassification, beit(SHARED), variant="shared", vision=BIASES["shared"]),
        Row(BeitForImageClassification, beit(OWN, SHARED), variant="both", vision=BIASES["both"]),
        Row(BeitForImageClassification, beit(scales=None), variant="absolute", vision=BIASES["absolute"]),
    ),
    others=(BeitForSemanticSegmentation, BeitBackbone),
    small={**BIASES["shared"], "num_hidden_layers": 3, "out_indices": [0, 1, 2, 3]},
    eager_only={"onnx": SDPA_ONNX},
)


def decode(model: Any, tokens: list[Tensor]) -> Tensor:
    """The stock heads on tokens [B, 65, D] of every stage."""
    maps = [x[:, 1:].transpose(1, 2).unflatten(-1, (8, 8)) for x in tokens[:4]]
    return model.decode_head(model.fpn(tuple(maps)))


@pytest.mark.parametrize("method", METHODS)
def test_segmentation_sees_the_grid(method: str, pixels: Tensor) -> None:
    assert_segmentation_sees_the_grid(CASE, BeitForSemanticSegmentation, METHODS[method], pixels, decode)


def test_segmentation_trains_through_soft_merging(pixels: Tensor) -> None:
    assert_segmentation_trains(CASE, BeitForSemanticSegmentation, pixels)
