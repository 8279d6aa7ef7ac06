"""CLIPSeg: a decoder taps three layers."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from transformers import CLIPSegForImageSegmentation, CLIPSegModel, CLIPSegVisionModel

from dtem_hf import MergeConfig, attach
from tests.families.clip import clip_head
from tests.support.family_case import FamilyCase, Row
from tests.support.slow_anatomies import clip_like
from tests.support.unmerging import METHODS, assert_the_reader_gets_all_tokens


CASE = FamilyCase(
    "clipseg",
    encoder=CLIPSegVisionModel,
    rows=(Row(CLIPSegVisionModel, clip_like("", clip_head), "pooler_output"),),
    others=(CLIPSegModel,),
    dense=(CLIPSegForImageSegmentation,),
    whole={
        "reduce_dim": 16,
        "extract_layers": [0, 2, 3],
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 24,
    },
)


@pytest.mark.parametrize("by", ["text", "embedding"])
@pytest.mark.parametrize("merge", METHODS.values(), ids=METHODS)
def test_the_decoder_reads_every_tap_in_its_place(merge: MergeConfig, by: str) -> None:
    words, embedding = CASE.words(CLIPSegForImageSegmentation, 2), {"conditional_embeddings": torch.ones(2, 16)}
    inputs = {**CASE.inputs(2), **(words if by == "text" else embedding)}
    output = assert_the_reader_gets_all_tokens(CASE, CLIPSegForImageSegmentation, merge, inputs)
    assert output.logits.shape == (2, 32, 32)


all_tokens_reach_the_reader = partial(test_the_decoder_reads_every_tap_in_its_place, METHODS["tome"], "text")


@torch.no_grad()
def test_an_image_as_a_prompt_is_merged_too() -> None:
    model, pixels = attach(CASE.make(CLIPSegForImageSegmentation), METHODS["tome"]), CASE.inputs(2)["pixel_values"]
    prompt = attach(CASE.make(CLIPSegModel), METHODS["tome"])
    prompt.load_state_dict(model.clip.state_dict())
    by_image = model(pixel_values=pixels, conditional_pixel_values=pixels.flip(0)).logits
    embedding = prompt.get_image_features(pixels.flip(0)).pooler_output
    assert torch.equal(by_image, model(pixel_values=pixels, conditional_embeddings=embedding).logits)
