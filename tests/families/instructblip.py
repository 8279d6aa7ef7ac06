"""InstructBLIP: the Q-Former reads the instruction beside the image's tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import InstructBlipForConditionalGeneration, InstructBlipModel, InstructBlipVisionModel

from dtem_hf import DTEMConfig, MergeConfig, ToMeConfig
from tests.families.blip import blip_head
from tests.support.family_case import FamilyCase, Row
from tests.support.qformers import (
    QUERIES,
    TEXT,
    WHOLE,
    WORDS,
    asked,
    assert_the_qformer_sees_each_token_as_often_as_it_counts,
    made,
)
from tests.support.slow_anatomies import clip_like
from tests.support.slow_parts import gelu


CASE = FamilyCase(
    "instructblip",
    encoder=InstructBlipVisionModel,
    rows=(
        Row(
            InstructBlipVisionModel,
            clip_like("", blip_head, qkv=("self_attn.qkv",), out="self_attn.projection", activation=gelu),
            "pooler_output",
        ),
    ),
    others=(InstructBlipModel, InstructBlipForConditionalGeneration),
    vision={"layer_norm_eps": 1e-5},
    text=TEXT,
    whole=WHOLE,
)
INSTRUCTION = WORDS[:, QUERIES:]


@pytest.mark.parametrize("merge", [ToMeConfig(r=9), DTEMConfig(r=9)], ids=["tome", "dtem"])
@pytest.mark.parametrize("model_class", CASE.others)
def test_the_qformer_counts_tokens(model_class: Any, merge: MergeConfig) -> None:
    inputs = {**asked(CASE), "qformer_input_ids": INSTRUCTION}
    assert_the_qformer_sees_each_token_as_often_as_it_counts(CASE, model_class, merge, inputs)


def every_model_weighs_tokens() -> None:
    for model_class in CASE.others:
        test_the_qformer_counts_tokens(model_class, ToMeConfig(r=9))


@torch.no_grad()
def test_answers_are_those_of_greedy_steps() -> None:
    model = made(CASE, InstructBlipForConditionalGeneration, ToMeConfig(r=9))
    inputs = {**asked(CASE), "qformer_input_ids": INSTRUCTION}
    answers = model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)[:, -5:]
    words = inputs["input_ids"]
    for _ in range(5):
        following = model(**{**inputs, "input_ids": words}).logits[:, -1].argmax(-1, keepdim=True)
        words = torch.cat([words, following], dim=1)
    assert torch.equal(answers, words[:, -5:])
