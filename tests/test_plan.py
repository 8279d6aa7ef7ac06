"""Plans against hand counts, torch's own FLOP counter, and what is published."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from dtem_hf import DTEMConfig, EViTConfig, MergeConfig, ToMeConfig, attach
from dtem_hf.errors import BadValue
from tests.test_schedule import encoder


def test_plan_adds_up_the_costs_of_every_layer() -> None:
    """Three layers from 11 tokens, one of them prefix, r = 3, 0, 50; every number by hand."""
    plan = encoder(3).plan(11, [3, 0, 50])
    assert plan.num_tokens == 11
    assert plan.reductions == [3, 0, 3]  # 8 tokens reach the last layer, 7 of them free
    assert plan.tokens == [8, 8, 5]
    assert plan.layer_multiply_adds == [
        11 * 400 + 121 * 20 + 8 * 800 + 11 * 50 + 30 + 5 * 5 * 5,
        8 * 400 + 64 * 20 + 8 * 800,
        8 * 400 + 64 * 20 + 5 * 800 + 8 * 50 + 30 + 3 * 4 * 5,
    ]
    around = 10 * 300 + 1000
    assert plan.multiply_adds == around + sum(plan.layer_multiply_adds)
    assert plan.unmerged_multiply_adds == around + 3 * (11 * 1200 + 121 * 20)
    assert plan.ratio == plan.multiply_adds / plan.unmerged_multiply_adds
    assert json.loads(json.dumps(plan.to_dict()))["ratio"] == plan.ratio
    assert [line.split()[:3] for line in str(plan).splitlines()[1:4]] == [
        ["0", "3", "8"],
        ["1", "0", "8"],
        ["2", "3", "5"],
    ]


def counted(model: torch.nn.Module, pixels: torch.Tensor, **kwargs: Any) -> int:
    """Multiply-adds of a forward pass for one image, as torch counts them where attention is two matrix products."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(pixels, **kwargs)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("kind", ["bare", "classifier"])
@pytest.mark.parametrize("method", [ToMeConfig, DTEMConfig])
@pytest.mark.parametrize("r", [0, 6, 50, [9, 0, 5, 3]], ids=str)
def test_plan_equals_what_torch_counts(
    make_bare: Callable[..., ViTModel],
    make_classifier: Callable[..., ViTForImageClassification],
    kind: str,
    method: Callable[[Any], MergeConfig],
    r: Any,
) -> None:
    make = make_bare if kind == "bare" else make_classifier
    model = attach(make(attn_implementation="eager"), method(r))
    plan = model.merge_plan()
    assert plan.multiply_adds == counted(model, torch.randn(1, 3, 32, 32))
    with model.unmerged():
        assert plan.unmerged_multiply_adds == counted(model, torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize("kind", ["bare", "classifier"])
@pytest.mark.parametrize("config", [EViTConfig(), EViTConfig(0.3, [0, 3]), EViTConfig(1.0)], ids=str)
def test_plan_of_evit_equals_what_torch_counts(
    make_bare: Callable[..., ViTModel],
    make_classifier: Callable[..., ViTForImageClassification],
    kind: str,
    config: EViTConfig,
) -> None:
    make = make_bare if kind == "bare" else make_classifier
    model = attach(make(attn_implementation="eager"), config)
    assert model.merge_plan().multiply_adds == counted(model, torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize("size", [(32, 32), (48, 48), (24, 40), (35, 38)], ids=str)
def test_plan_for_another_image_size_equals_what_torch_counts(
    make_classifier: Callable[..., ViTForImageClassification], size: tuple[int, int]
) -> None:
    """Also for a size that is no whole number of patches."""
    model = attach(make_classifier(attn_implementation="eager"), DTEMConfig(r=7))
    measured = counted(model, torch.randn(1, 3, *size), interpolate_pos_encoding=True)
    assert model.merge_plan(image_size=size).multiply_adds == measured
    if size[0] == size[1]:
        assert model.merge_plan(image_size=size[0]).multiply_adds == measured


@pytest.mark.parametrize("value", [0, -32, 32.0, (32,), (32, 32, 3), "32", True, 3, (32, 3)], ids=repr)
def test_a_bad_image_size_is_refused(make_classifier: Callable[..., ViTForImageClassification], value: Any) -> None:
    model = attach(make_classifier(), ToMeConfig(r=4))
    with pytest.raises(BadValue, match="image_size="):
        model.merge_plan(image_size=value)


@pytest.mark.parametrize("width, heads, giga", [(192, 3, 1.26), (384, 6, 4.60), (768, 12, 17.6)])
def test_unmerged_deit_costs_what_is_published(width: int, heads: int, giga: float) -> None:
    config = ViTConfig(
        hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width, num_labels=1000, image_size=224
    )
    with torch.device("meta"):
        model = attach(ViTForImageClassification(config), ToMeConfig(r=16))
    plan = model.merge_plan()
    assert plan.unmerged_multiply_adds == pytest.approx(giga * 1e9, rel=0.01)
    by_hand = 12 * (197 * 12 * width**2 + 2 * 197**2 * width) + 196 * 768 * width + 1000 * width
    assert plan.unmerged_multiply_adds == by_hand


def test_deit_small_at_r_16_costs_what_the_authors_count() -> None:
    """2.294 G; the keys' mean is one of keys that attention has computed."""
    config = ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_labels=1000, image_size=224)
    with torch.device("meta"):
        model = attach(ViTForImageClassification(config), ToMeConfig(r=16))
    plan = model.merge_plan()
    assert [plan.num_tokens, *plan.tokens] == [197, 181, 165, 149, 133, 117, 101, 85, 69, 53, 37, 21, 11]
    assert plan.multiply_adds == pytest.approx(2.294e9, rel=0.0005)
    assert plan.layer_multiply_adds[-1] == 21 * 4 * 384**2 + 2 * 21**2 * 384 + 11 * 8 * 384**2 + 10 * 10 * 64
