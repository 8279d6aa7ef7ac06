"""EViT against a slow one, written from docs/method.md section 7; and what it asks of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dtem_hf import (
    BadValue,
    DTEMConfig,
    EViTConfig,
    FlopsSchedule,
    KeepRateSchedule,
    attach,
    detach,
)
from tests.support import slow_model
from tests.support.families import row_of
from tests.support.slow_steps import Reduction


Make = Callable[..., Any]


@torch.no_grad()
def assert_equal_to_slow(merged: Any, plain: Any, pixels: Tensor, config: EViTConfig, layers: list[int]) -> None:
    """Logits, source maps and sizes are those of docs/method.md section 7, one image at a time."""
    weights = {name: value.double() for name, value in plain.state_dict().items()}
    rates = [config.keep_rate if index in layers else None for index in range(4)]
    reduction = Reduction(keep_rates=rates, proportional=config.proportional_attention)
    with merged.trace_merging() as trace:
        logits = merged(pixels).logits
    for image in range(len(pixels)):
        inputs = {"pixel_values": pixels[image].double()}
        expected, trail = slow_model.run(weights, row_of("vit").anatomy, inputs, reduction)
        torch.testing.assert_close(logits[image].double(), expected["logits"], atol=2e-5, rtol=1e-5)
        for source, sizes, tokens in zip(trace.source_maps, trace.sizes, trail, strict=True):
            members = [
                [i for i, place in enumerate(source[image].tolist()) if place == j] for j in range(len(tokens.x))
            ]
            assert members == tokens.members
            assert sizes[image].tolist() == tokens.sizes.tolist()
    assert [len(tokens.x) for tokens in trail] == merged.merge_plan().tokens


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "config, layers",
    [
        (EViTConfig(), [1, 2, 3]),
        (EViTConfig(0.5, [0, 2]), [0, 2]),
        (EViTConfig(0.5, [2, 0]), [0, 2]),
        (EViTConfig(0.9, [0, 1, 2, 3]), [0, 1, 2, 3]),
        (EViTConfig(0.02, [1]), [1]),
        (EViTConfig(0.3, [3]), [3]),
        (EViTConfig(0.6, proportional_attention=True), [1, 2, 3]),
    ],
    ids=str,
)
def test_it_equals_the_slow_one(
    make_classifier: Make, pixels: Tensor, config: EViTConfig, layers: list[int], attn_implementation: str
) -> None:
    """Logits, source maps through several layers (a fused token is ranked and fused like any other), and sizes."""
    model = attach(make_classifier(attn_implementation=attn_implementation), config)
    assert_equal_to_slow(model, make_classifier(), pixels, config, layers)


@pytest.mark.parametrize("config", [EViTConfig(1.0), EViTConfig(0.5, [])], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_keeping_everything_is_bit_identical_to_the_plain_model(
    make_classifier: Make, pixels: Tensor, config: EViTConfig, training: bool
) -> None:
    plain = make_classifier().train(training)
    expected = plain(pixels).logits
    model = attach(make_classifier().train(training), config)
    assert torch.equal(model(pixels).logits, expected)
    model.set_reduction(KeepRateSchedule(0.4))
    assert not torch.equal(model(pixels).logits, expected)
    assert torch.equal(detach(model)(pixels).logits, expected)


def test_it_is_the_same_in_training_and_gradients_flow_through_the_attention(
    make_classifier: Make, pixels: Tensor
) -> None:
    """The weights of the fused token come from queries and keys; those of the last layer only count through them."""
    model = attach(make_classifier(), EViTConfig(0.5, [2]))
    expected = model(pixels).logits
    logits = model.train()(pixels).logits
    assert torch.equal(logits, expected)
    logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    with_fused, without = (grad_of_ranking_query(make_classifier, pixels, layers) for layers in ([2], []))
    assert not torch.allclose(with_fused, without, rtol=0.01)


def grad_of_ranking_query(make_classifier: Make, pixels: Tensor, layers: list[int]) -> Tensor:
    model = attach(make_classifier(), EViTConfig(0.5, layers))
    model(pixels).logits.square().sum().backward()
    return model.vit.layers[2].attention.q_proj.weight.grad


def test_a_mask_over_patches_counts_where_the_ranking_layer_is_the_first_to_reduce(
    make_classifier: Make, pixels: Tensor
) -> None:
    """SDPA's masks are boolean, eager's are added; what may not be seen is fused with no weight."""
    mask = torch.ones(3, 65, dtype=torch.long)
    mask[:, 40:] = 0
    outputs = []
    for attn_implementation in ("eager", "sdpa"):
        model = attach(make_classifier(attn_implementation=attn_implementation), EViTConfig(0.5, [3]))
        with torch.no_grad(), model.trace_merging() as trace:
            outputs.append(model(pixels, attention_mask=mask).logits)
        assert (trace.source_maps[3][:, 40:] == trace.source_maps[3].max()).all()
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("flops", [0.8, 0.5])
def test_the_keep_rate_is_solved_for_a_share_of_the_multiply_adds(
    make_classifier: Make, pixels: Tensor, flops: float
) -> None:
    model = attach(make_classifier(), EViTConfig(0.9, [0, 2]))
    model.set_reduction(flops=flops)
    assert flops - 0.03 < model.merge_plan().ratio <= flops
    assert model.merge_config.layers == [0, 2]
    assert model.config.merge == model.merge_config.to_dict()
    with model.trace_merging() as trace, torch.no_grad():
        model(pixels)
    assert [sizes.shape[1] for sizes in trace.sizes] == model.merge_plan().tokens


def test_a_keep_rate_can_be_set_also_from_its_json(make_classifier: Make) -> None:
    model = attach(make_classifier(), EViTConfig(0.9, proportional_attention=True))
    model.set_reduction(KeepRateSchedule(0.5, (1,)))
    assert model.merge_config == EViTConfig(0.5, [1], proportional_attention=True)
    model.set_reduction({"kind": "keep_rate", "keep_rate": 0.25, "layers": None})
    assert model.merge_config == EViTConfig(0.25, proportional_attention=True)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"r": 8}, "r=8: a KeepRateSchedule"),
        ({"r": 0.7}, "r=0.7: a KeepRateSchedule"),
        ({"r": [8, 8, 8, 8]}, "a KeepRateSchedule"),
        ({"r": FlopsSchedule(0.5, slope=0.5)}, "a KeepRateSchedule"),
        ({"r": KeepRateSchedule(0.5, (1, 4))}, "layers=[1, 4]: layers from 0 to 3, as the model has 4"),
        ({"flops": 0.01}, "flops=0.01: more, or reduce in more or earlier layers"),
        ({"flops": 1.5}, "flops=1.5"),
    ],
    ids=str,
)
def test_a_bad_reduction_is_refused_by_name_and_changes_nothing(
    make_classifier: Make, arguments: dict[str, Any], message: str
) -> None:
    model = attach(make_classifier(), EViTConfig(0.9))
    with pytest.raises(BadValue) as raised:
        model.set_reduction(**arguments)
    assert message in str(raised.value)
    assert model.merge_config == EViTConfig(0.9)
    assert model.config.merge == EViTConfig(0.9).to_dict()


def test_layers_that_the_model_has_not_are_refused(make_classifier: Make) -> None:
    with pytest.raises(BadValue, match=r"layers=\[4\]: layers from 0 to 3, as the model has 4"):
        attach(make_classifier(), EViTConfig(layers=[4]))


def test_there_is_no_embedding_and_no_adapter(make_classifier: Make, tmp_path: Any) -> None:
    model = attach(make_classifier(), DTEMConfig(r=4))
    attach(model, EViTConfig())
    assert list(model.merge_parameters()) == []
    assert not any("merge" in name for name in model.state_dict())
    with pytest.raises(ValueError, match="method='evit' learns nothing"):
        model.save_merge_adapter(tmp_path)
