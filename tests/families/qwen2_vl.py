"""Qwen2-VL's vision tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from tests.support.family_case import FamilyCase, Row
from tests.support.packed_rows import (
    NOT_EXPORTED,
    PROMPTS,
    assert_a_prompt_generates,
    assert_an_image_alone_is_the_same_among_others,
    assert_merged_tokens_and_mixed_traces_are_refused,
    assert_segments_equal_the_slow_reference,
    assert_sizes_are_rounded_as_the_processor_does,
    assert_sizes_that_differ_are_the_plain_model_where_nothing_merges,
    merger,
    packed,
    rows_of,
    tower,
)
from tests.support.slow_model import quick_gelu


def spelled(fields: dict[str, Any]) -> dict[str, Any]:
    names = {"hidden_size": "embed_dim", "num_hidden_layers": "depth", "num_attention_heads": "num_heads"}
    kept = {names.get(name, name): value for name, value in fields.items() if name != "image_size"}
    return {**kept, "hidden_size": 16, "mlp_ratio": 2, "num_position_embeddings": fields["num_patches"]}


CASE = FamilyCase(
    "qwen2_vl",
    encoder=Qwen2VisionTransformerPretrainedModel,
    rows=(
        Row(
            Qwen2VisionTransformerPretrainedModel,
            tower(
                lambda weights, inputs: 0.0,
                lambda weights, x: merger(weights, "merger", x, "ln_q", "mlp.0", "mlp.2"),
                activation=quick_gelu,
            ),
            "pooler_output",
        ),
    ),
    inputs=packed,
    spelled=spelled,
    uneven=lambda count: rows_of([(1, 4, 8)] * count),
    lacking={"compile": NOT_EXPORTED, "export": NOT_EXPORTED, "onnx": NOT_EXPORTED},
)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_images_of_several_sizes_equal_the_slow_reference(attention: str) -> None:
    assert_segments_equal_the_slow_reference(CASE, attention)


def test_an_image_alone_is_the_same_among_others() -> None:
    assert_an_image_alone_is_the_same_among_others(CASE)


def test_sizes_that_differ_are_the_plain_model_where_nothing_merges() -> None:
    assert_sizes_that_differ_are_the_plain_model_where_nothing_merges(CASE)


def test_merged_tokens_and_mixed_traces_are_refused() -> None:
    assert_merged_tokens_and_mixed_traces_are_refused(CASE)


def test_sizes_are_rounded_as_the_processor_does() -> None:
    assert_sizes_are_rounded_as_the_processor_does(CASE)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_generates(prompt: str, tmp_path: Path) -> None:
    assert_a_prompt_generates(CASE, Qwen2VLForConditionalGeneration, prompt, tmp_path)
