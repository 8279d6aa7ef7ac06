"""ViTPose's backbone, whose readers need every token in its place: images with a border, and no prefix token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import VitPoseBackbone

from dtem_hf import MergeConfig, ToMeConfig, UnsupportedModelError, attach
from tests.support import methods, slow_model
from tests.support.family_case import FamilyCase, Inputs, images
from tests.support.slow_anatomies import normed_tokens, vit_like
from tests.support.slow_parts import Weights, layer_norm
from tests.support.unmerging import METHODS, assert_the_reader_gets_all_tokens


def spelled(fields: dict[str, Any]) -> dict[str, Any]:
    """Patches of 8 pixels: a border of 2 on every side would make one more of 4."""
    side = 2 * fields["image_size"]
    return {**fields, "image_size": [side, side], "patch_size": [8, 8]}


def larger(count: int, height: int = 32, width: int = 32) -> Inputs:
    return images(count, 2 * height, 2 * width)


CASE = FamilyCase(
    "vitpose_backbone",
    encoder=VitPoseBackbone,
    rows=(),
    vision={"mlp_ratio": 2},
    inputs=larger,
    spelled=spelled,
)


def embed(weights: Weights, inputs: Inputs) -> Tensor:
    root = "embeddings.patch_embeddings.projection"
    image = torch.nn.functional.pad(inputs["pixel_values"], (2, 2, 2, 2))
    flat = [image[:, i : i + 8, j : j + 8].flatten() for i in range(0, 61, 8) for j in range(0, 61, 8)]
    x = torch.stack(flat) @ weights[root + ".weight"].flatten(1).T + weights[root + ".bias"]
    return x + weights["embeddings.position_embeddings"][0, 1:] + weights["embeddings.position_embeddings"][0, :1]


ANATOMY = replace(
    vit_like("", normed_tokens("layernorm"), specials=(), layer="encoder.layer.{}."),
    embed=embed,
    qkv=tuple(f"attention.attention.{name}" for name in ("query", "key", "value")),
    out="attention.output.dense",
)
SLOW = {name: pair for case in methods.METHODS.values() for name, pair in case.slow.items()}


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("method", ["tome", "dtem", "soft"])
def test_the_feature_map_is_the_slow_one_with_all_tokens_in_place(method: str, attention: str) -> None:
    config, reduction = SLOW[method]
    model = attach(CASE.make(VitPoseBackbone, attention, num_hidden_layers=3), config)
    for parameter in model.merge_parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    weights = {
        name.replace("merge_embedding.projections", "merge_embedding.layers"): value.double()
        for name, value in model.state_dict().items()
    }
    inputs = CASE.inputs(2)
    datasets = torch.tensor([0, 1])  # which a backbone without experts takes and leaves aside
    (found,) = model(**inputs, dataset_index=datasets).feature_maps
    for image in range(2):
        one = {name: value[image].double() for name, value in inputs.items()}
        _, trail = slow_model.run(weights, ANATOMY, one, reduction)
        place = {member: i for i, members in enumerate(trail[-1].members) for member in members}
        last = layer_norm(weights, "layernorm", trail[-1].x, 1e-12)
        expected = torch.stack([last[place[patch]] for patch in range(64)])
        torch.testing.assert_close(found[image].double(), expected, atol=1e-5, rtol=1e-5)


def equals_the_slow_reference() -> None:
    test_the_feature_map_is_the_slow_one_with_all_tokens_in_place("tome", "eager")


@pytest.mark.parametrize("merge", METHODS.values(), ids=METHODS)
def test_every_stage_gets_all_tokens_in_place(merge: MergeConfig) -> None:
    if merge.method not in ("evit", "dtps", "etps"):
        stages = {"out_indices": [1, 2, 3, 4]}
        assert_the_reader_gets_all_tokens(CASE, VitPoseBackbone, merge, CASE.inputs(2), **stages)


def all_tokens_reach_the_reader() -> None:
    test_every_stage_gets_all_tokens_in_place(METHODS["tome"])


def test_experts_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="num_experts=2"):
        attach(CASE.make(VitPoseBackbone, num_experts=2, part_features=8), ToMeConfig(r=9))
