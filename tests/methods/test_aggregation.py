"""Learned powers of sizes and lengths of means in whole models, by properties: what stays, and where gradients lead.

What they compute is held against the slow reference in tests/families/test_slow_reference.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dtem_hf import DTEMConfig, attach
from tests.support.families import row_of


Make = Callable[..., Any]
LEARN = {"learn_exponents": True, "learn_norms": True}
# Not the temperatures of the paper, at which the steepest gradients hide the others.
MILD = {"score_temperature": 0.5, "assignment_temperature": 1.0, "top_k": 8}
RELAXATIONS = ["hard", "soft", "straight_through"]


def aggregation(model: Any) -> dict[str, Tensor]:
    """What says how merged tokens count, by name."""
    return {
        name.partition("merge_embedding.")[2].removesuffix(".value"): parameter
        for name, parameter in model.named_parameters()
        if "merge_embedding.exponents" in name or "merge_embedding.norms" in name
    }


def disturbed(model: Any) -> Any:
    """No longer neutral."""
    for name, parameter in aggregation(model).items():
        parameter.data = 0.3 * torch.randn_like(parameter) + float(name.startswith("exponents"))
    return model


@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_neutral_it_is_bit_identical_to_the_config_without(
    make_classifier: Make, pixels: Tensor, relaxation: str, with_gradients: bool
) -> None:
    """And so are the gradients of what tokens are compared by.

    Up to rounding, where another kernel computes the same: without gradients a model may run lean, and attention takes
    another way where only its bias, of all that a hard merge makes, wants a gradient.
    """
    outputs, gradients = [], []
    for learn in ({}, LEARN):
        model = attach(make_classifier(), DTEMConfig(r=9, relaxation=relaxation, **MILD, **learn)).train()
        with torch.set_grad_enabled(with_gradients):
            outputs.append(model(pixels).logits)
        if with_gradients:
            outputs[-1].square().sum().backward()
            gradients.append([layer.weight.grad for layer in model.vit.merge_embedding.projections])
    if with_gradients and relaxation != "hard":
        assert torch.equal(*outputs)
        for ours, theirs in zip(*gradients, strict=True):
            assert (ours is None) == (theirs is None)
            assert ours is None or torch.allclose(ours, theirs, atol=1e-6, rtol=1e-4)
    else:
        torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prefix_and_tokens_that_nobody_joined_stay_bit_for_bit(
    make_classifier: Make, pixels: Tensor, dtype: torch.dtype, with_gradients: bool
) -> None:
    """Behind the first merge, where both models have the same tokens: only those of a size above 1 are longer."""
    states = []
    for share in (0.0, 1.0):
        model = attach(make_classifier(num_hidden_layers=2).to(dtype), DTEMConfig(r=9, **LEARN))
        model.vit.merge_embedding.norms[0].value.data.fill_(share)
        seen: list[Tensor] = []
        model.vit.layers[0].layernorm_after.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0]))
        with torch.set_grad_enabled(with_gradients), model.trace_merging() as trace:
            model(pixels.to(dtype))
        states.append((seen[0].detach(), trace.sizes[0]))
    (plain, sizes), (longer, same_sizes) = states
    assert torch.equal(sizes, same_sizes)
    joined = sizes > 1
    assert not joined[:, 0].any() and 0 < joined.sum() < joined.numel()
    assert torch.equal(longer[~joined], plain[~joined])
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    cosine = F.cosine_similarity(longer[joined].float(), plain[joined].float(), dim=-1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine), atol=tolerance, rtol=0)
    assert (longer[joined].float().norm(dim=-1) > plain[joined].float().norm(dim=-1)).all()


@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_gradients_reach_all_that_counts(make_classifier: Make, pixels: Tensor, relaxation: str) -> None:
    """Not the first layer's exponents, as there are no sizes yet, nor the last norm, which the head does not read."""
    model = disturbed(attach(make_classifier(), DTEMConfig(r=9, relaxation=relaxation, **MILD, **LEARN))).train()
    model(pixels).logits.square().sum().backward()
    reached = {
        name
        for name, parameter in aggregation(model).items()
        if parameter.grad is not None and parameter.grad.abs().min() > 0
    }
    assert reached == aggregation(model).keys() - {"exponents.0", "norms.3"}
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    compares = [bool(layer.weight.grad.any()) for layer in model.vit.merge_embedding.projections]
    assert any(compares) == (relaxation != "hard")


@pytest.mark.parametrize("relaxation", ["hard", "straight_through"])
def test_gradients_equal_finite_differences(make_classifier: Make, pixels: Tensor, relaxation: str) -> None:
    """Of the same discrete merges: who merges with whom does not tip over within so small a step."""
    config = DTEMConfig(r=9, relaxation=relaxation, **MILD, **LEARN)
    model = disturbed(attach(make_classifier(num_hidden_layers=3).double(), config)).train()
    upstream = torch.randn(3, 10, dtype=torch.float64)

    def loss() -> Tensor:
        return (model(pixels.double()).logits * upstream).sum()

    loss().backward()
    step, compared = 1e-3, 0
    with model.trace_merging() as trace, torch.no_grad():
        loss()
        sources = [source.clone() for source in trace.source_maps]
    for name, parameter in aggregation(model).items():
        if name in ("exponents.0", "norms.2"):
            continue
        differences = torch.zeros_like(parameter)
        for i in range(parameter.numel()):
            values = []
            for sign in (1, -1):
                parameter.data[i] += sign * step
                with model.trace_merging() as trace, torch.no_grad():
                    values.append(loss())
                assert all(torch.equal(a, b) for a, b in zip(trace.source_maps, sources, strict=True)), name
                parameter.data[i] -= sign * step
            differences[i] = (values[0] - values[1]) / (2 * step)
        assert (parameter.grad - differences).norm() < 2e-3 * differences.norm(), name
        compared += 1
    assert compared == 4


def test_straight_through_is_the_hard_merge_going_forward(make_classifier: Make, pixels: Tensor) -> None:
    torch.manual_seed(4)
    model = disturbed(attach(make_classifier(), DTEMConfig(r=9, relaxation="straight_through", **LEARN)))
    with torch.no_grad():
        torch.testing.assert_close(model.train()(pixels).logits, model.eval()(pixels).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_what_padding_holds_is_nobodys_business(relaxation: str, with_gradients: bool) -> None:
    """SigLIP 2 with powers near 0, to which a size near 0 is no small number."""
    config = DTEMConfig(r=6, relaxation=relaxation, **MILD, **LEARN)
    model = disturbed(attach(row_of("siglip2").make(), config)).train()
    for name, parameter in aggregation(model).items():
        if name.startswith("exponents"):
            parameter.data = torch.tensor([0.05, 0.3, 1.0, -0.2])
    inputs = row_of("siglip2").inputs(2)
    inputs["spatial_shapes"] = torch.tensor([[6, 8], [7, 8]])
    for row, real in enumerate((48, 56)):
        inputs["pixel_attention_mask"][row, real:] = 0
    outputs = []
    for noise in (0.0, 3.0):
        padding = noise * torch.randn_like(inputs["pixel_values"]) * (inputs["pixel_attention_mask"] == 0)[..., None]
        with torch.set_grad_enabled(with_gradients):
            outputs.append(model(**{**inputs, "pixel_values": inputs["pixel_values"] + padding}).pooler_output)
    assert outputs[0].isfinite().all()
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_low_precision_stays_finite(make_classifier: Make, pixels: Tensor, relaxation: str) -> None:
    """As a bfloat16 model and under autocast, with all gradients."""
    for dtype in (torch.bfloat16, torch.float32):
        config = DTEMConfig(r=20, relaxation=relaxation, **LEARN)
        model = disturbed(attach(make_classifier(), config)).to(dtype).train()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            logits = model(pixels.to(dtype)).logits
        logits.float().square().sum().backward()
        assert logits.isfinite().all()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_inference_equals_the_modules(make_classifier: Make, pixels: Tensor) -> None:
    """What runs without gradients, perhaps by other code, against what runs with them."""
    model = disturbed(attach(make_classifier(), DTEMConfig(r=9, **LEARN)))
    expected = model(pixels).logits.detach()
    for images in (pixels, pixels[:1]):
        with torch.no_grad():
            torch.testing.assert_close(model(images).logits, expected[: len(images)], atol=1e-5, rtol=1e-5)


def test_one_graph_of_torch_compile_trains_as_eager_does(make_classifier: Make, pixels: Tensor) -> None:
    """Straight through, which takes in the hard matching and the soft grouping."""
    torch._dynamo.reset()
    config = DTEMConfig(r=4, relaxation="straight_through", **MILD, **LEARN)
    model = disturbed(attach(make_classifier(num_hidden_layers=2), config)).train()
    found = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        logits = run(pixels).logits
        logits.square().sum().backward()
        gradients = {name: p.grad.clone() for name, p in aggregation(model).items() if p.grad is not None}
        found.append((logits.detach(), gradients))
    (expected, theirs), (ours_logits, ours) = found
    torch.testing.assert_close(ours_logits, expected, atol=1e-5, rtol=1e-5)
    assert ours.keys() == theirs.keys() and len(ours) >= 2
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-4, rtol=1e-3)
