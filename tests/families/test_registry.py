"""Which models can be merged, and what an error says of the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import BertConfig, BertModel, ViTForMaskedImageModeling

from dtem_hf import ToMeConfig, UnsupportedModelError, attach
from dtem_hf.families import SUPPORTED
from tests.support.families import CASES


def test_an_unknown_family_is_refused_in_a_line_or_two() -> None:
    """The reason comes first; the page that is named lists the models."""
    model = BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    with pytest.raises(UnsupportedModelError) as raised:
        attach(model, ToMeConfig(r=1))
    message = str(raised.value)
    assert message.startswith("BertModel cannot be merged: it holds no encoder that dtem_hf knows. ")
    assert "docs/ecosystem.md lists all" in message and len(message) < 300


def test_the_models_that_can_be_merged_are_those_of_the_cases() -> None:
    expected = {each.__name__ for case in CASES.values() for each in case.models}
    assert {each.__name__ for each in SUPPORTED} == expected


@pytest.mark.parametrize(
    "name, reason",
    [
        ("SamModel", "windows of a grid"),
        ("SamVisionModel", "windows of a grid"),
        ("Sam2Model", "windows of a grid"),
        ("SwinModel", "windows of a grid"),
        ("Swinv2Model", "windows of a grid"),
        ("DonutSwinModel", "windows of a grid"),
        ("Qwen2_5_VLModel", "windows of a grid"),
        ("Qwen2_5_VLForConditionalGeneration", "windows of a grid"),
        ("HieraModel", "pools tokens between its layers"),
        ("EomtForUniversalSegmentation", "queries join the patches"),
        ("YolosModel", "detection tokens stand behind the patches"),
    ],
)
def test_what_cannot_be_merged_is_refused_with_the_reason(name: str, reason: str) -> None:
    model_class = getattr(transformers, name)
    with torch.device("meta"):
        model = model_class(model_class.config_class())
    with pytest.raises(UnsupportedModelError, match=rf"{name} cannot be merged: .*{reason}"):
        attach(model, ToMeConfig(r=1))


def test_a_model_of_no_family_gets_all_tokens_of_the_encoder_inside(tiny_config: Callable[..., Any]) -> None:
    """It reads a picture off its ViT's output."""
    model = attach(ViTForMaskedImageModeling(tiny_config()), ToMeConfig(r=1))
    assert model.merge_config.part == "vit"
    tokens = model.merge_plan()
    assert tokens.output_tokens == tokens.num_tokens > tokens.tokens[-1]


@pytest.mark.parametrize("extra", [0, 2])
def test_a_model_must_hold_exactly_one_encoder(make_classifier: Callable[..., Any], extra: int) -> None:
    model = make_classifier()
    if extra:
        model.teacher = make_classifier()
    else:
        model.vit = torch.nn.Identity()
    with pytest.raises(UnsupportedModelError, match=rf"holds {extra} encoders; merging needs exactly one"):
        attach(model, ToMeConfig(r=1))


@torch.no_grad()
def test_a_subclass_is_merged_as_its_base_is(make_classifier: Callable[..., Any], pixels: Tensor) -> None:
    plain = make_classifier()

    class Mine(type(plain)):  # type: ignore[misc]
        pass

    mine = Mine(plain.config).eval()
    mine.load_state_dict(plain.state_dict())
    ours, theirs = (attach(model, ToMeConfig(r=9))(pixels).logits for model in (mine, plain))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("size, expected", [(None, 65), (32, 65), (48, 145), ((32, 16), 33), ([16, 32], 33), (35, 65)])
def test_tokens_of_an_image(make_classifier: Callable[..., Any], size: Any, expected: int) -> None:
    assert attach(make_classifier(), ToMeConfig(r=9)).merge_plan(size).num_tokens == expected
