"""dTPS: what its predictors are, where they go, what is drawn, and what it refuses. Outputs: the families' tests."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GitModel

from dtem_hf import (
    AutoModelForImageClassification,
    BadValue,
    DTPSConfig,
    KeepRateSchedule,
    MergeAdapter,
    UnsupportedModelError,
    attach,
    ops,
)
from dtem_hf.evaluation.correlation import similarity_correlations
from dtem_hf.models.install import recorded_states
from dtem_hf.training.parameters import relax
from tests.support.families import CASES


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
    for layers, message in (
        ((1, 2, 3), "2 layers: this is the number of learned predictors"),
        ((0, 1), "layers from 1 on"),
    ):
        with pytest.raises(BadValue, match=message):
            model.set_reduction(KeepRateSchedule(0.5, layers))
    assert model.merge_config.layers == [2, 3]


def drawing(model: Any, keep: float) -> Any:
    """The model as it learns; `keep` is added to every logit to keep a patch."""
    for predictor in model.vit.merge_embedding.predictors:
        predictor.fc3.bias.data[0] += keep
    relax(model, True)
    return model


def gradients(model: Any, pixels: Tensor) -> dict[str, Tensor]:
    """Of all parameters, after the same draw every time."""
    model.zero_grad()
    torch.manual_seed(3)
    model(pixels).logits.square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
def test_in_training_a_draw_that_keeps_all_is_the_plain_model(make_classifier: Make, pixels: Tensor) -> None:
    model = drawing(attach(make_classifier(), DTPSConfig(0.6, [1, 3])), 1e4)
    with model.trace_merging() as trace:
        logits = model(pixels).logits
    assert [sizes.tolist() for sizes in trace.sizes] == [[[1.0] * 65] * 3] * 4
    torch.testing.assert_close(logits, make_classifier()(pixels).logits, atol=1e-6, rtol=1e-6)


def test_in_training_one_patch_is_kept_at_least(make_classifier: Make, pixels: Tensor) -> None:
    """The most probable one, as in `.eval()`; all gradients are finite."""
    model = attach(make_classifier(), DTPSConfig(0.001, [1, 3]))
    with torch.no_grad(), model.trace_merging() as hard:
        expected = model(pixels).logits
    drawing(model, -1e4)
    with model.trace_merging() as trace:
        logits = model(pixels).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    for drawn, kept in zip(trace.sizes, hard.sizes, strict=True):
        assert [sorted(row)[-2:] for row in drawn.tolist()] == [[1.0, 64.0]] * 3 and kept.tolist() == [[1.0, 64.0]] * 3
    assert all(gradient.isfinite().all() for gradient in gradients(model, pixels).values())


def test_patches_are_kept_as_often_as_the_predictor_says() -> None:
    probability = torch.tensor([0.1, 0.5, 0.8, 0.9])
    log_probabilities = torch.stack([probability, 1 - probability], dim=-1).log()[None].expand(20_000, -1, -1)
    earlier = torch.tensor([1.0, 1.0, 1.0, 0.0]).expand(20_000, -1)
    shares = ops.draw_kept(log_probabilities, earlier).mean(dim=0)
    lost = 0.9 * 0.5 * 0.2  # where none is drawn, the most probable of those that are left stays
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.5, 0.8 + lost, 0.0]), atol=0.01, rtol=0)


@torch.no_grad()
def test_in_training_a_pruned_patch_is_handed_on_as_its_host(make_bare: Make, pixels: Tensor) -> None:
    model = attach(make_bare(), DTPSConfig(0.6, [1, 3]))
    relax(model, True)
    with model.trace_merging() as trace:
        tokens = model(pixels).last_hidden_state
    source = trace.source_maps[-1]
    assert tokens.shape[1] == 65 and 0 < (trace.sizes[-1] > 0).sum() < 3 * 65
    assert torch.equal(tokens, tokens.gather(1, source.unsqueeze(-1).expand_as(tokens)))
    for image in range(3):
        assert source[image].bincount(minlength=65).tolist() == trace.sizes[-1][image].round().tolist()


def test_checkpointing_and_eager_attention_change_no_gradient(make_classifier: Make, pixels: Tensor) -> None:
    config = DTPSConfig(0.6, [1, 3])
    expected = gradients(drawing(attach(make_classifier(), config), 0.5), pixels)
    assert sum("merge_embedding" in name and bool(gradient.any()) for name, gradient in expected.items()) == 20
    eager = drawing(attach(make_classifier(attn_implementation="eager"), config), 0.5)
    torch.testing.assert_close(gradients(eager, pixels), expected, atol=1e-5, rtol=1e-4)
    model = drawing(attach(make_classifier(), config), 0.5)
    model.gradient_checkpointing_enable()
    torch.testing.assert_close(gradients(model, pixels), expected, atol=1e-6, rtol=1e-5)
    refused = {"use_reentrant": True}, {"use_reentrant": False, "preserve_rng_state": False}
    for options, message in zip(refused, ("the gradient of token sizes", "would draw other tokens"), strict=True):
        model.gradient_checkpointing_enable(options)
        with pytest.raises(UnsupportedModelError, match=message):
            model(pixels)


def test_passes_in_two_threads_keep_their_masks_apart(make_classifier: Make, pixels: Tensor) -> None:
    model = drawing(attach(make_classifier(), DTPSConfig(0.6, [1, 3])), 0.5)
    both_run = Barrier(2)

    def learn(images: Tensor) -> list[list[int]]:
        with recorded_states(model) as states:
            both_run.wait()
            model(images)
            both_run.wait()
        return [list(kept.shape) for state in states for kept in state.kept.values()]

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(learn, (pixels, pixels[:2]))) == [[[3, 65]] * 2, [[2, 65]] * 2]


@pytest.mark.parametrize(
    "family, model_class, message",
    [("git", GitModel, "which the decoder would see"), ("qwen2_vl", None, "rows cannot hold pruned tokens")],
    ids=["git", "qwen2_vl"],
)
def test_models_that_would_see_pruned_tokens_learn_no_dtps(family: str, model_class: Any, message: str) -> None:
    case = CASES[family]
    model_class = model_class or case.encoder
    inputs = {**case.words(model_class, 2), **case.inputs(2)}
    model = attach(case.make(model_class), DTPSConfig(0.6, [1, 2]))
    assert model(**inputs)[0].isfinite().all()
    with pytest.raises(UnsupportedModelError, match=message):
        model.train()(**inputs)
