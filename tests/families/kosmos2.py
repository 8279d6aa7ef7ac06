"""Kosmos-2: CLIP's tower, whose tokens the queries of a resampler read by their sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Kosmos2ForConditionalGeneration, Kosmos2Model
from transformers.models.kosmos2.modeling_kosmos2 import Kosmos2VisionModel

from dtem_hf import DTEMConfig, MergeConfig, ToMeConfig, attach
from tests.families.clip import clip_head
from tests.support import slow_reference as slow
from tests.support.family_case import FamilyCase, Row
from tests.support.slow_anatomies import clip_like
from tests.support.slow_parts import layer_norm, linear
from tests.support.unmerging import traced


WRITERS = (Kosmos2Model, Kosmos2ForConditionalGeneration)
CASE = FamilyCase(
    "kosmos2",
    encoder=Kosmos2VisionModel,
    rows=(Row(Kosmos2VisionModel, clip_like("model.", clip_head), "pooler_output"),),
    others=WRITERS,
    text={"embed_dim": 32, "layers": 1, "attention_heads": 2, "ffn_dim": 48},
    whole={"latent_query_num": 4},
    lacking={"pipelines": "not tested: its processor writes 64 tokens for an image, the small models here read 4"},
)
SOFT = DTEMConfig(r=9, score_temperature=0.5, assignment_temperature=1.0)


def queried(model: Any) -> tuple[Tensor, Tensor, Any]:
    """What a merged model's resampler says [B, Q, E], the tokens that it saw [B, n, D], and the trace."""
    seen: list[Any] = []
    handle = model.image_to_text_projection.register_forward_hook(lambda _, args, output: seen.append((args, output)))
    _, trace = traced(model, **CASE.inputs(2), **CASE.words(type(model), 2))
    handle.remove()
    (((tokens,), (output, _)),) = seen
    return output, tokens, trace


@pytest.mark.parametrize("merge, training", [(ToMeConfig(r=9), False), (SOFT, False), (SOFT, True)])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("model_class", WRITERS)
def test_the_resampler_counts_tokens(model_class: Any, attention: str, merge: MergeConfig, training: bool) -> None:
    """It is the slow one on tokens by their sizes, also on softly merged ones; uncounted, it is another."""
    model = CASE.make(model_class, attention)
    model.image_to_text_projection.x_attn.dropout = 0.0
    attach(model.train(training), merge)
    output, tokens, trace = queried(model)
    root = "image_to_text_projection."
    weights = {name: value.double() for name, value in model.state_dict().items()}
    query = weights[root + "latent_query"]
    for image in range(2):
        states = torch.cat([linear(weights, root + "dense", tokens[image].double()), query])
        sizes = torch.cat([trace.sizes[-1][image].double(), torch.ones(4).double()])
        q, k, v = (
            linear(weights, f"{root}x_attn.{name}_proj", x) for name, x in (("q", query), ("k", states), ("v", states))
        )
        counted, uncounted = (
            linear(weights, root + "x_attn.out_proj", slow.attention(q, k, v, 2, 16**-0.5, each))
            for each in (sizes, None)
        )
        torch.testing.assert_close(output[image].double(), counted, atol=1e-5, rtol=1e-5)
        assert (uncounted - counted).abs().max() > 1e-4


def every_model_weighs_tokens() -> None:
    for model_class in WRITERS:
        test_the_resampler_counts_tokens(model_class, "sdpa", ToMeConfig(r=9), False)


def test_the_resampler_sees_the_tokens_behind_the_last_norm() -> None:
    model = attach(CASE.make(Kosmos2Model), ToMeConfig(r=9))
    _, tokens, _ = queried(model)
    assert tokens.shape[1] == model.merge_plan().output_tokens == 65 - 4 * 9
    with torch.no_grad():
        last = model.vision_model(**CASE.inputs(2)).last_hidden_state
    weights = {name.removeprefix("vision_model.model."): value for name, value in model.state_dict().items()}
    normed = layer_norm(weights, "post_layernorm", last, 1e-5)
    expected = normed / normed.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("merge", [ToMeConfig(r=9), DTEMConfig(r=9)], ids=["tome", "dtem"])
def test_texts_are_those_of_greedy_steps(merge: MergeConfig) -> None:
    """`generate` runs tower and resampler outside of the forward pass, and counts tokens as it does."""
    model = attach(CASE.make(Kosmos2ForConditionalGeneration), merge)
    inputs = {**CASE.inputs(2), **CASE.words(Kosmos2ForConditionalGeneration, 2)}
    written = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)[:, -4:]
    for _ in range(4):
        following = model(**inputs).logits[:, -1].argmax(-1, keepdim=True)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], following], dim=1)
        mask = inputs["image_embeds_position_mask"]
        inputs["image_embeds_position_mask"] = torch.cat([mask, torch.zeros_like(mask[:, :1])], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    assert torch.equal(written, inputs["input_ids"][:, -4:])
