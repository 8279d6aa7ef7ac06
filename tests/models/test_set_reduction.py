"""`set_reduction`: how much is merged changes, and nothing else."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from dtem_hf import BadValue, ConstantSchedule, DTEMConfig, FlopsSchedule, LinearSchedule, ToMeConfig, attach
from tests.models.test_attach import Make, assert_unchanged, logits, snapshot


@pytest.mark.parametrize(
    "arguments, schedule",
    [
        ({"r": 3}, ConstantSchedule(3)),
        ({"r": 0}, ConstantSchedule(0)),
        ({"r": LinearSchedule(2)}, LinearSchedule(2)),
        ({"flops": 0.7}, FlopsSchedule(0.7)),
    ],
    ids=str,
)
@pytest.mark.parametrize("config", [ToMeConfig(r=9), DTEMConfig(r=9, top_k=2)], ids=["tome", "dtem"])
def test_set_reduction_changes_how_much_and_nothing_else(
    make_classifier: Make, pixels: Tensor, config: Any, arguments: dict[str, Any], schedule: Any
) -> None:
    model = attach(make_classifier(), config)
    for parameter in model.merge_parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    parameters = dict(model.named_parameters())
    model.set_reduction(**arguments)
    assert model.merge_config.schedule == schedule
    assert {**model.merge_config.to_dict(), "r": None} == {**config.to_dict(), "r": None}
    assert model.config.merge == model.merge_config.to_dict()
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    with model.trace_merging() as trace:
        logits(model, pixels)
    tokens = model.merge_plan().tokens
    assert [sizes.shape[1] for sizes in trace.sizes] == tokens
    assert repr(trace) == f"MergeTrace(4 layers, tokens {' → '.join(map(str, [65, *tokens]))})"
    assert config.r == 9  # the user's own object is left alone


def test_a_share_of_flops_is_met(make_classifier: Make) -> None:
    model = attach(make_classifier(), DTEMConfig(flops=0.6))
    assert 0.5 < model.merge_plan().ratio <= 0.6
    model.set_reduction(flops=0.8)
    assert 0.7 < model.merge_plan().ratio <= 0.8


@pytest.mark.parametrize("r", [33, [0, 200]])
def test_an_r_that_no_layer_can_merge_is_lowered_and_named(make_classifier: Make, r: Any) -> None:
    """Of 64 patches a layer can merge half; fewer tokens further on are as usual, and give no warning."""
    largest = max(r) if isinstance(r, list) else r
    with pytest.warns(UserWarning, match=rf"r={largest}: .* 64 patches, .* at most half, 32;"):
        model = attach(make_classifier(num_hidden_layers=2), ToMeConfig(r=r))
    assert max(model.merge_plan().reductions) == 32
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.set_reduction(8)
        model.set_reduction(flops=0.8)
        attach(make_classifier(), DTEMConfig())  # its r of 16 was not asked for


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"r": -1}, "r=-1"),
        ({"r": [1, 2]}, "2 layers and the model has 4"),
        ({"r": "16"}, "r='16'"),
        ({"flops": 2}, "flops=2"),
        ({"flops": 0.001}, "flops=0.001: merging everything still leaves"),
        ({}, "exactly one of them"),
        ({"r": 3, "flops": 0.5}, "exactly one of them"),
    ],
    ids=str,
)
def test_a_bad_set_reduction_leaves_the_model_as_it_was(
    make_classifier: Make, pixels: Tensor, arguments: dict[str, Any], message: str
) -> None:
    model = attach(make_classifier(), DTEMConfig(r=9))
    before, expected, config = snapshot(model), logits(model, pixels), model.merge_config
    with pytest.raises(BadValue) as raised:
        model.set_reduction(**arguments)
    assert message in str(raised.value)
    assert_unchanged(model, before)
    assert model.merge_config == config
    assert torch.equal(logits(model, pixels), expected)
