"""dTPS: what its predictors are, where they go, and what it refuses. The families' tests hold its outputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dtem_hf import AutoModelForImageClassification, BadValue, DTPSConfig, KeepRateSchedule, MergeAdapter, attach
from dtem_hf.evaluation.correlation import similarity_correlations


Make = Callable[..., Any]


def learned(model: Any) -> Any:
    """A model whose predictors are not those that it started with."""
    draw = torch.Generator().manual_seed(1)
    for parameter in model.merge_parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=draw)
    return model


@torch.no_grad()
def test_its_adapter_and_its_checkpoint_hold_the_predictors(
    make_classifier: Make, pixels: Tensor, tmp_path: Path
) -> None:
    model = learned(attach(make_classifier(), DTPSConfig(0.6, [1, 3])))
    expected = model(pixels).logits
    model.save_merge_adapter(tmp_path / "adapter")
    adapter = MergeAdapter.from_pretrained(tmp_path / "adapter")
    width = model.config.hidden_size
    linear = {
        "embed": (width, width),
        "fc1": (width // 2, width),
        "fc2": (width // 4, width // 2),
        "fc3": (2, width // 4),
    }
    shapes = {f"{name}.weight": list(shape) for name, shape in linear.items()}
    shapes |= {f"{name}.bias": [shape[0]] for name, shape in linear.items()}
    shapes |= {"norm.weight": [width], "norm.bias": [width]}
    wanted = {f"predictors.{stage}.{name}": shape for stage in range(2) for name, shape in shapes.items()}
    assert {name: list(tensor.shape) for name, tensor in adapter.tensors.items()} == wanted
    assert torch.equal(attach(make_classifier(), tmp_path / "adapter")(pixels).logits, expected)
    card = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "model.set_reduction(flops=0.6)" in card and "learned scores by which dTPS chooses tokens" in card
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "model")
    assert loaded.merge_config == model.merge_config
    assert torch.equal(loaded(pixels).logits, expected)


@torch.no_grad()
def test_tokens_leave_in_front_of_a_layer(make_classifier: Make, pixels: Tensor) -> None:
    """Attention of the layer sees what is left: ⌊0.6 · 64⌋ and ⌊0.36 · 64⌋ patches, and CLS."""
    model = attach(make_classifier(attn_implementation="eager"), DTPSConfig(0.6, [1, 3]))
    output = model(pixels, output_attentions=True)
    assert [weights.shape[-1] for weights in output.attentions] == [65, 39, 39, 24]
    assert model.merge_plan().tokens == [39, 39, 24, 24]


def test_its_predictors_are_no_embedding_that_ranks_pairs(make_classifier: Make, pixels: Tensor) -> None:
    with pytest.raises(BadValue, match="a model with a learned embedding: attach DTEM"):
        similarity_correlations(attach(make_classifier(), DTPSConfig()), pixels)


def test_it_starts_the_same_every_time_and_draws_nothing(make_classifier: Make) -> None:
    plain = make_classifier()
    before = torch.get_rng_state()
    one = attach(plain, DTPSConfig()).to_merge_adapter().tensors
    assert torch.equal(torch.get_rng_state(), before)
    other = attach(make_classifier(), DTPSConfig()).to_merge_adapter().tensors
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_keep_rate_and_layers_change_as_long_as_every_stage_has_its_predictor(make_classifier: Make) -> None:
    model = attach(make_classifier(), DTPSConfig(0.6, [1, 3]))
    model.set_reduction(KeepRateSchedule(0.5, (2, 3)))
    assert model.merge_config == DTPSConfig(0.5, [2, 3])
    model.set_reduction(flops=0.7)
    assert 0.65 < model.merge_plan().ratio <= 0.7
    for layers, message in (((1, 2, 3), "2 layers, as many as have learned scores"), ((0, 1), "layers from 1 on")):
        with pytest.raises(BadValue, match=message):
            model.set_reduction(KeepRateSchedule(0.5, layers))
    assert model.merge_config.layers == [2, 3]
