"""OWLv2: heads that read a class and a box off every patch."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from transformers import Owlv2ForObjectDetection, Owlv2Model, Owlv2VisionModel

from dtem_hf import MergeConfig, attach
from tests.families.clip import clip_head
from tests.support.family_case import FamilyCase, Row
from tests.support.slow_anatomies import clip_like
from tests.support.unmerging import METHODS, assert_the_reader_gets_all_tokens


CASE = FamilyCase(
    "owlv2",
    encoder=Owlv2VisionModel,
    rows=(Row(Owlv2VisionModel, clip_like("vision_model.", clip_head), "pooler_output"),),
    others=(Owlv2Model,),
    dense=(Owlv2ForObjectDetection,),
    whole={"projection_dim": 32},
)


@pytest.mark.parametrize("merge", METHODS.values(), ids=METHODS)
def test_every_patch_gets_a_class_and_a_box(merge: MergeConfig) -> None:
    inputs = {**CASE.inputs(2), **CASE.words(Owlv2ForObjectDetection, 4)}  # two texts an image
    output = assert_the_reader_gets_all_tokens(CASE, Owlv2ForObjectDetection, merge, inputs)
    assert output.logits.shape == (2, 64, 2) and output.pred_boxes.shape == (2, 64, 4)


all_tokens_reach_the_reader = partial(test_every_patch_gets_a_class_and_a_box, METHODS["tome"])


@torch.no_grad()
def test_detection_by_an_image_reads_every_patch_too() -> None:
    """Its feature map is made outside of the forward pass."""
    model, pixels = attach(CASE.make(Owlv2ForObjectDetection), METHODS["tome"]), CASE.inputs(2)["pixel_values"]
    found = model.image_guided_detection(pixels, query_pixel_values=pixels)
    assert found.logits.shape[:2] == found.target_pred_boxes.shape[:2] == (2, 64)
    different = {tuple(patch.tolist()) for patch in found.image_embeds[0].flatten(0, 1)}
    assert len(different) == model.merge_plan().tokens[-1] - 1
