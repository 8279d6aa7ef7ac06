"""Data2Vec: built like BEiT, with other names."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor
from transformers import (
    Data2VecVisionForImageClassification,
    Data2VecVisionForSemanticSegmentation,
    Data2VecVisionModel,
)

from tests.support.family_case import FamilyCase, Row
from tests.support.slow_anatomies import BIASES, RELATIVE_TABLE, SDPA_ONNX, beit_like
from tests.support.slow_model import Anatomy
from tests.support.unmerging import METHODS, assert_segmentation_sees_the_grid, assert_segmentation_trains


def data2vec(*tables: str, **changes: Any) -> Anatomy:
    return beit_like(
        "data2vec_vision.",
        layer="data2vec_vision.encoder.layer.{}.",
        mlp=("intermediate.dense", "output.dense"),
        tables=tuple("data2vec_vision.encoder." + name for name in tables),
        **changes,
    )


OWN = "layer.{}.attention.attention." + RELATIVE_TABLE
CLASSIFIER = Data2VecVisionForImageClassification
CASE = FamilyCase(
    "data2vec_vision",
    encoder=Data2VecVisionModel,
    rows=(
        Row(CLASSIFIER, data2vec(OWN), variant="relative", vision=BIASES["relative"]),
        Row(CLASSIFIER, data2vec(RELATIVE_TABLE), variant="shared", vision=BIASES["shared"]),
        Row(CLASSIFIER, data2vec(OWN, RELATIVE_TABLE), variant="both", vision=BIASES["both"]),
        Row(CLASSIFIER, data2vec(scales=None), variant="absolute", vision=BIASES["absolute"]),
    ),
    others=(Data2VecVisionForSemanticSegmentation,),
    small=BIASES["shared"],
    eager_only={"onnx": SDPA_ONNX},
)


def decode(model: Any, tokens: list[Tensor]) -> Tensor:
    """The stock heads on tokens [B, 65, D] of every stage."""
    maps = [x[:, 1:].transpose(1, 2).unflatten(-1, (8, 8)) for x in tokens[:4]]
    necks = (model.fpn1, model.fpn2, model.fpn3, model.fpn4)
    return model.decode_head([neck(x) for neck, x in zip(necks, maps, strict=True)])


@pytest.mark.parametrize("method", METHODS)
def test_segmentation_sees_the_grid(method: str, pixels: Tensor) -> None:
    assert_segmentation_sees_the_grid(CASE, Data2VecVisionForSemanticSegmentation, METHODS[method], pixels, decode)


def test_segmentation_trains_through_soft_merging(pixels: Tensor) -> None:
    assert_segmentation_trains(CASE, Data2VecVisionForSemanticSegmentation, pixels)
