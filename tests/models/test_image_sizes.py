"""Prompts for images of other sizes than the model's own: each image gets the placeholders of its own plan."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from torch import Tensor

import dtem_hf
from dtem_hf import ToMeConfig, attach
from tests.models.test_processor import (
    WORDS,
    answered_by_hand,
    ask,
    features,
    handed_on,
    saved_processor,
)
from tests.support.containers import built, llava, vipllava


# Numbers of pixels that no patch of 4 divides, one of them of as many patches as the model's own size, and no squares.
SIZES = [(33, 34), (46, 31), (41, 41)]
NUM_PATCHES = [64, 77, 100]


@pytest.fixture(params=[llava, vipllava])
def any_size(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Any]:
    """A LLaVA that hands on merged tokens, and its processor, which leaves images in their size."""
    saved_processor(tmp_path, "llava")
    model, _ = built(request.param)
    attach(model, ToMeConfig(r=5), unmerge=False)
    processor = dtem_hf.AutoProcessor.from_pretrained(tmp_path, merge=model)
    processor.image_processor.do_resize = processor.image_processor.do_center_crop = False
    return model, processor


ANY_SIZE = {"interpolate_pos_encoding": True, "return_dict": True}


def given(model: Any, inputs: dict[str, Tensor], seen: list[Any]) -> Tensor:
    """Logits from features that were computed before, of one image each."""
    if "mm_encoder_outputs" not in signature(type(model.model).forward).parameters:
        pytest.skip(f"transformers {tf.__version__} takes no mm_encoder_outputs")
    rows = [each.pooler_output[0] for each in seen]
    first = seen[0]
    first.pooler_output = tuple(rows) if isinstance(first.pooler_output, (list, tuple)) else torch.cat(rows)[None]
    texts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    return model(**texts, mm_encoder_outputs={"image": first}).logits


def pictures_of(sizes: list[tuple[int, int]]) -> list[np.ndarray]:
    return [np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8) for i, size in enumerate(sizes)]


@torch.no_grad()
@pytest.mark.parametrize("which", range(3))
def test_images_of_an_odd_size_get_the_placeholders_of_their_own_plan(any_size: tuple[Any, Any], which: int) -> None:
    model, processor = any_size
    inputs = ask(processor, pictures_of(SIZES[which : which + 1]), ["<image> what is this"])
    count = handed_on(model, 5, NUM_PATCHES[which])
    assert (inputs["input_ids"] == WORDS.index("<image>")).sum() == count
    plan = model.merge_plan(image_size=SIZES[which])
    assert plan.num_tokens == NUM_PATCHES[which] + 1 and plan.output_tokens == count + 1  # the CLS token
    read = features(model, inputs["pixel_values"], interpolate_pos_encoding=True)
    expected = answered_by_hand(model, inputs, list(read))
    found = given(model, inputs, [model.get_image_features(inputs["pixel_values"], **ANY_SIZE)])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    if isinstance(model, tf.LlavaForConditionalGeneration):  # VipLLaVA's forward does not hand the option on
        assert torch.equal(model(**inputs, interpolate_pos_encoding=True).logits, found)


@torch.no_grad()
@pytest.mark.parametrize("together", [True, False], ids=["one prompt", "three prompts"])
def test_images_of_several_sizes_each_get_their_own_placeholders(any_size: tuple[Any, Any], together: bool) -> None:
    """A tower sees images of one size at once: the features of each are computed before and handed over."""
    model, processor = any_size
    images = pictures_of(SIZES)
    texts = ["<image> and <image> and <image> what"] if together else ["<image> what", "<image>", "<image> is this"]
    batch = processor(images=[images] if together else [[image] for image in images], text=texts, padding=True)
    inputs = {name: torch.tensor(batch[name]) for name in ("input_ids", "attention_mask")}
    counts = [handed_on(model, 5, number) for number in NUM_PATCHES]
    found = (inputs["input_ids"] == WORDS.index("<image>")).sum(dim=1).tolist()
    assert found == ([sum(counts)] if together else counts)
    pixels = [torch.as_tensor(np.array(each)).unsqueeze(0) for each in batch["pixel_values"]]
    read = [features(model, each, interpolate_pos_encoding=True)[0] for each in pixels]
    expected = answered_by_hand(model, inputs, read)
    seen = [model.get_image_features(each, **ANY_SIZE) for each in pixels]
    torch.testing.assert_close(given(model, inputs, seen), expected, atol=1e-5, rtol=1e-5)
