"""DPT with a ViT of its own."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import DPTForDepthEstimation, DPTForSemanticSegmentation, DPTModel

from dtem_hf import MergeConfig, ToMeConfig, UnsupportedModelError, attach
from tests.families.vit import vit_head
from tests.support.family_case import FamilyCase, Row
from tests.support.slow_anatomies import vit_like
from tests.support.unmerging import METHODS, assert_the_reader_gets_all_tokens


CASE = FamilyCase(
    "dpt",
    encoder=DPTModel,
    rows=(
        Row(
            DPTModel,
            vit_like("", vit_head, layer="encoder.layer.{}.", mlp=("intermediate.dense", "output.dense")),
            "pooler_output",
        ),
    ),
    dense=(DPTForDepthEstimation, DPTForSemanticSegmentation),
    vision={
        "is_hybrid": False,
        "backbone_out_indices": [0, 1, 2, 3],
        "neck_hidden_sizes": [8, 8, 8, 8],
        "reassemble_factors": [4, 2, 1, 0.5],
        "fusion_hidden_size": 8,
        "use_auxiliary_head": True,
    },
)


@pytest.mark.parametrize("merge", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("model_class", CASE.dense)
def test_heads_read_every_tap_in_its_place(model_class: Any, merge: MergeConfig) -> None:
    assert_the_reader_gets_all_tokens(CASE, model_class, merge, CASE.inputs(2))


def all_tokens_reach_the_reader() -> None:
    for model_class in CASE.dense:
        test_heads_read_every_tap_in_its_place(model_class, METHODS["tome"])


def test_a_hybrid_is_refused() -> None:
    model = CASE.make(DPTModel)
    model.config.is_hybrid = True
    with pytest.raises(UnsupportedModelError, match="is_hybrid=True: its tokens come from a convolutional network"):
        attach(model, ToMeConfig(r=9))
