"""The registry of families, and what is read off an encoder (`test_equals_slow_reference.py`: what it computes)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, ViTForMaskedImageModeling

from dtem_hf import ToMeConfig, UnsupportedModelError, attach
from dtem_hf.families import check_attention_implementation, families, find_encoder, find_family


def test_an_unknown_family_is_refused_with_the_list_of_known_ones() -> None:
    model = BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    with pytest.raises(UnsupportedModelError) as raised:
        attach(model, ToMeConfig(r=1))
    assert str(raised.value).startswith("BertModel cannot be merged; supported are ")
    for family in families():
        for supported in family.all_models():
            assert supported.__name__ in str(raised.value)


def test_a_model_that_needs_every_token_is_refused(tiny_config: Callable[..., Any]) -> None:
    """It holds a ViT, and reads a picture off its output."""
    with pytest.raises(UnsupportedModelError, match="ViTForMaskedImageModeling cannot be merged"):
        attach(ViTForMaskedImageModeling(tiny_config()), ToMeConfig(r=1))


@pytest.mark.parametrize("extra", [0, 2])
def test_a_model_must_hold_exactly_one_encoder(make_classifier: Callable[..., Any], extra: int) -> None:
    model = make_classifier()
    if extra:
        model.teacher = make_classifier()
    else:
        model.vit = torch.nn.Identity()
    with pytest.raises(UnsupportedModelError, match=rf"holds {extra} encoders; merging needs exactly one"):
        find_encoder(model)


def test_a_subclass_belongs_to_its_bases_family(make_classifier: Callable[..., Any]) -> None:
    class Mine(type(make_classifier())):  # type: ignore[misc]
        pass

    assert type(find_family(Mine)) is type(find_family(type(make_classifier())))


def test_the_mean_of_keys_is_the_mean_over_heads(make_classifier: Callable[..., Any]) -> None:
    backbone, encoder = find_encoder(make_classifier())
    for layer in backbone.layers(encoder):
        h = torch.randn(2, 9, 32)
        keys = layer.attention.k_proj(h)
        expected = sum(keys[..., 8 * head : 8 * head + 8] for head in range(4)) / 4
        torch.testing.assert_close(backbone.mean_keys(layer, h), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size, expected", [(None, 65), (32, 65), (48, 145), ((32, 16), 33), ([16, 32], 33), (35, 65)])
def test_tokens_of_an_image(make_classifier: Callable[..., Any], size: Any, expected: int) -> None:
    backbone, encoder = find_encoder(make_classifier())
    assert backbone.num_tokens(encoder, size) == expected


@pytest.mark.parametrize("name", ["eager", "sdpa", None])
def test_exact_attention_is_let_through(name: str | None) -> None:
    check_attention_implementation(name)


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "flex_attention", "paged|sdpa"])
def test_other_attention_is_refused_with_what_would_do(name: str) -> None:
    with pytest.raises(UnsupportedModelError) as raised:
        check_attention_implementation(name)
    assert repr(name) in str(raised.value)
    assert "eager, sdpa" in str(raised.value)
