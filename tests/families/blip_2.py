"""BLIP-2: BLIP's tower, whose tokens the Q-Former reads by their sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Model,
    Blip2VisionModel,
    Blip2VisionModelWithProjection,
)

from dtem_hf import DTEMConfig, MergeConfig, ToMeConfig, attach
from tests.families.blip import blip_head
from tests.support.family_case import FamilyCase, Inputs, Row
from tests.support.qformers import (
    TEXT,
    WHOLE,
    WORDS,
    asked,
    assert_the_qformer_sees_each_token_as_often_as_it_counts,
    made,
    queried,
    slow_qformer,
)
from tests.support.slow_anatomies import clip_like
from tests.support.slow_parts import gelu


CASE = FamilyCase(
    "blip_2",
    encoder=Blip2VisionModel,
    rows=(
        Row(
            Blip2VisionModel,
            clip_like("", blip_head, qkv=("self_attn.qkv",), out="self_attn.projection", activation=gelu),
            "pooler_output",
        ),
    ),
    others=(Blip2Model, Blip2VisionModelWithProjection, Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval),
    vision={"layer_norm_eps": 1e-5},
    text=TEXT,
    whole=WHOLE,
)
METHODS = {"tome": ToMeConfig(r=9), "dtem": DTEMConfig(r=9)}
WITH_TEXT = (Blip2Model, Blip2ForConditionalGeneration)


@pytest.mark.parametrize("merge", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("model_class", [Blip2VisionModelWithProjection, *WITH_TEXT])
def test_the_qformer_counts_tokens(model_class: Any, merge: MergeConfig) -> None:
    inputs = asked(CASE) if model_class in WITH_TEXT else CASE.inputs(2)
    assert_the_qformer_sees_each_token_as_often_as_it_counts(CASE, model_class, merge, inputs)


@pytest.mark.parametrize("training", [False, True], ids=["hard", "soft"])
def test_the_qformer_is_the_slow_one(training: bool) -> None:
    """Also on softly merged tokens, whose sizes are no whole numbers; without sizes it is another."""
    config = DTEMConfig(r=9, score_temperature=0.5, assignment_temperature=1.0)
    model = made(CASE, Blip2VisionModelWithProjection, config).train(training)
    output, tokens, trace = queried(model, CASE.inputs(2))
    weights = {name: value.double() for name, value in model.state_dict().items()}
    for image in range(2):
        seen, sizes = tokens[image].double(), trace.sizes[-1][image].double()
        expected = slow_qformer(weights, seen, sizes)
        torch.testing.assert_close(output[image].double(), expected, atol=1e-5, rtol=1e-5)
        assert (slow_qformer(weights, seen, None) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("training", [False, True], ids=["hard", "soft"])
def test_with_all_tokens_in_place_the_qformer_says_the_same(training: bool) -> None:
    config = DTEMConfig(r=9, score_temperature=0.5, assignment_temperature=1.0)
    model, inputs = made(CASE, Blip2VisionModelWithProjection, config).train(training), CASE.inputs(2)
    short, *_ = queried(model, inputs)
    model = made(CASE, Blip2VisionModelWithProjection)
    full, tokens, _ = queried(attach(model, config, unmerge=True).train(training), inputs)
    assert tokens.shape[1] == 65
    torch.testing.assert_close(full, short, atol=1e-5, rtol=1e-5)


def every_model_weighs_tokens() -> None:
    for model_class in (Blip2VisionModelWithProjection, *WITH_TEXT):
        test_the_qformer_counts_tokens(model_class, ToMeConfig(r=9))
    test_retrieval_counts_tokens(False)


def scores(model: Any, inputs: Inputs, matching: bool) -> torch.Tensor:
    words = {"input_ids": WORDS, "attention_mask": torch.ones_like(WORDS)}
    with torch.no_grad():
        return model(**inputs, **words, use_image_text_matching_head=matching).logits_per_image


@pytest.mark.parametrize("matching", [False, True])
def test_retrieval_counts_tokens(matching: bool) -> None:
    """The score is that of the model which gets all tokens back in place, and not that of uncounted ones."""
    model, inputs = made(CASE, Blip2ForImageTextRetrieval, ToMeConfig(r=9)), CASE.inputs(2)
    short = scores(model, inputs, matching)
    full = attach(made(CASE, Blip2ForImageTextRetrieval), ToMeConfig(r=9), unmerge=True)
    torch.testing.assert_close(short, scores(full, inputs, matching), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_captions_are_those_of_greedy_steps(method: str) -> None:
    """`generate` runs tower and Q-Former outside of the forward pass, and counts tokens as it does."""
    model, inputs = made(CASE, Blip2ForConditionalGeneration, METHODS[method]), asked(CASE)
    made_of = model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)[:, -5:]
    words = inputs["input_ids"]
    for _ in range(5):
        following = model(**{**inputs, "input_ids": words}).logits[:, -1].argmax(-1, keepdim=True)
        words = torch.cat([words, following], dim=1)
    assert torch.equal(made_of, words[:, -5:])


@torch.no_grad()
@pytest.mark.parametrize("name", ["get_image_features", "get_qformer_features"])
def test_features_count_tokens_too(name: str) -> None:
    model_class = Blip2Model if name == "get_qformer_features" else Blip2ForConditionalGeneration
    model, pixels = made(CASE, model_class, ToMeConfig(r=9)), CASE.inputs(2)["pixel_values"]
    features = getattr(model, name)(pixels)
    features = features if name == "get_qformer_features" else features.qformer_outputs.last_hidden_state
    torch.testing.assert_close(features, queried(model, asked(CASE))[0], atol=1e-6, rtol=1e-6)
