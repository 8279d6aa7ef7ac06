"""Every family, every method: equal to loops over tokens, written from docs/method.md, fed with the weights alone."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import ViTImageProcessorPil

from dtem_hf import AutoModelForImageClassification, attach
from dtem_hf.models.install import merging_of, recorded_states
from dtem_hf.training.parameters import relax
from tests.support import methods, slow_model
from tests.support.families import ROWS
from tests.support.family_case import Row
from tests.support.passes import of_image
from tests.support.slow_anatomies import first_token_logits, vit_like
from tests.support.slow_steps import Tokens


# Each method as the package takes it, and as the reference does.
METHODS = {name: pair for case in methods.METHODS.values() for name, pair in case.slow.items()}
# An attention takes the logarithms of sizes, learned powers of them, or nothing, and a method may ask it for weights.
# All methods run with the first implementation, and with the others one for each of these.
OTHERS_TAKE = ("tome", "soft-aggregated", "evit")
CASES = [
    pytest.param(row, method, attention, id=f"{row}-{method}-{attention}")
    for row in ROWS
    for case in methods.METHODS.values()
    for method in case.slow
    for attention in row.case.attentions
    if case.fits(row)
    and (attention == row.case.attentions[0] or method in OTHERS_TAKE or row.family in methods.ONE_OF_EACH)
]
# Both at once in every row. What each does alone is the same code in every family: one of each kind shows it.
WITH_GRADIENTS = [
    pytest.param(row, method, id=f"{row}-{method}")
    for row in ROWS
    for method in ("soft", "aggregated", "soft-aggregated")
    if method == "soft-aggregated" or row.family in methods.ONE_OF_EACH
]


def lively(row: Row, attention: str = "sdpa") -> Any:
    """A model of three layers and 36 patches, whose every weight matters."""
    model = row.make(attention, num_hidden_layers=3, image_size=24, num_patches=36)
    draw = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        scale = 0.2 if name.endswith("bias") or parameter.dim() > 1 else 0.1
        parameter.data = scale * torch.randn(parameter.shape, generator=draw)
        if "table" in name:  # as large as the scores that it is added to
            parameter.data *= 5
        if parameter.dim() == 1 and not name.endswith("bias"):  # norms and layer scales
            parameter.data += 0.8
    return model


def merged(row: Row, method: str, attention: str = "sdpa") -> Any:
    """What a method learns is drawn as well: nothing reminds of the keys."""
    model = attach(lively(row, attention), METHODS[method][0])
    draw = torch.Generator().manual_seed(3)
    for parameter in model.merge_parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=draw)
    for name, parameter in model.named_parameters():
        if "merge_embedding.exponents" in name:
            parameter.data += 1
    return model


def name_of(name: str) -> str:
    """A name in the state dict as the anatomies know it; older releases call projections otherwise.

    What is learned has its names in adapter files.
    """
    name = name.replace("merge_embedding.projections.", "merge_embedding.layers.")
    name = re.sub(r"merge_embedding\.(exponents|norms)\.(\d+)\.value", r"merge_embedding.\1.\2", name)
    name = re.sub(r"attention\.attention\.(query|key|value)\.", lambda found: f"attention.{found[1][0]}_proj.", name)
    return name.replace("attention.output.dense", "attention.o_proj")


def weights_of(model: Any) -> dict[str, Tensor]:
    """The state dict in float64."""
    return {name_of(name): value.double() for name, value in model.state_dict().items()}


def one(inputs: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    """One of two images, in float64."""
    chosen = {name: of_image(value, index, 2) for name, value in inputs.items()}
    return {name: value.double() if value.is_floating_point() else value for name, value in chosen.items()}


@cache
def expected(row: Row, method: str) -> list[tuple[dict[str, Tensor], list[Tokens]]]:
    """Image by image."""
    weights, inputs = weights_of(merged(row, method)), row.case.small_inputs(2)
    return [slow_model.run(weights, row.anatomy, one(inputs, index), METHODS[method][1]) for index in range(2)]


def assert_same_tokens(trace: Any, image: int, trail: list[Tokens]) -> None:
    """What they count for, and who stands for whom, behind every layer; padding may go anywhere."""
    for source, sizes, tokens in zip(trace.source_maps, trace.sizes, trail, strict=True):
        torch.testing.assert_close(sizes[image].double(), tokens.sizes, atol=1e-5, rtol=0)
        place = {
            member: position
            for position, members in enumerate(tokens.members)
            for member in members
            if tokens.sizes[position] > 0
        }
        assert {member: int(source[image, member]) for member in place} == place


def assert_same_outputs(output: Any, image: int, outputs: dict[str, Tensor], last: Tokens) -> None:
    for name, theirs in outputs.items():
        ours = of_image(output[name], image, 2).double()
        if name == "last_hidden_state" and len(ours) == last.active:  # what stands in padding is read by no part
            real = last.sizes[: last.active] > 0
            ours, theirs = ours[real], theirs[real]
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-6, msg=partial("{}: {}".format, name))


@pytest.mark.parametrize("row, method, attention", CASES)
@torch.no_grad()
def test_a_merged_model_equals_the_slow_reference(row: Row, method: str, attention: str) -> None:
    """All outputs, and who stands for whom behind every layer."""
    model = merged(row, method, attention)
    with model.trace_merging() as trace:
        output = model(**row.case.small_inputs(2))
    for image, (outputs, trail) in enumerate(expected(row, method)):
        assert_same_tokens(trace, image, trail)
        assert_same_outputs(output, image, outputs, trail[-1])


@pytest.mark.parametrize("row, method", WITH_GRADIENTS)
def test_gradients_equal_those_of_the_slow_reference(row: Row, method: str) -> None:
    """Of every weight, of the learned embedding among them, by a fixed function of the output.

    A hard merge teaches how merged tokens count, and nothing of how tokens compare.
    """
    model, inputs = merged(row, method), row.case.small_inputs(2)
    with model.trace_merging() as trace:
        output = model(**inputs)[row.output]
    slope = torch.randn(output.shape, generator=torch.Generator().manual_seed(4))
    if "patch_attention_mask" in inputs:  # what padding says is not compared
        slope *= (trace.sizes[-1][:, : slope.shape[1]] > 0).unsqueeze(-1)
    (output * slope).sum().backward()
    weights = {name: value.requires_grad_() for name, value in weights_of(model).items()}
    for image in range(2):
        outputs, _ = slow_model.run(weights, row.anatomy, one(inputs, image), METHODS[method][1])
        (outputs[row.output] * of_image(slope, image, 2)).sum().backward()
    assert assert_same_gradients(model, weights, method == "aggregated") >= 2


def assert_same_gradients(model: Any, weights: dict[str, Tensor], hard: bool = False) -> int:
    """Returns the number of learned tensors that were compared; none of how tokens compare, if they merge `hard`."""
    largest = max(float(value.grad.norm()) for value in weights.values() if value.grad is not None)
    compared = 0
    for name, parameter in model.named_parameters():
        theirs = weights[name_of(name)].grad
        if parameter.requires_grad and theirs is not None and theirs.norm() > 1e-6 * largest:
            error = (parameter.grad.double() - theirs).norm() / theirs.norm()
            assert error < 1e-4, (name, float(error))
            compared += "merge_embedding" in name
        elif hard and "merge_embedding.layers" in name_of(name):
            assert parameter.grad is None or not parameter.grad.any(), name
    return compared


@pytest.mark.parametrize("method", ["dtps", "dtps-counted"])
@pytest.mark.parametrize("row", [row for row in ROWS if methods.METHODS["dtps"].fits(row)], ids=str)
def test_dtps_learns_as_the_slow_reference_does(row: Row, method: str) -> None:
    """Outputs, masks and gradients of a training pass with the same Gumbel noise, and what is added to the loss."""
    model, inputs = merged(row, method).double(), row.case.small_inputs(2)
    relax(model, True)
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    config, reduction = METHODS[method]
    layers = [layer - 1 for layer in config.layers]
    torch.manual_seed(7)
    with model.trace_merging() as trace, recorded_states(model) as states:
        output = model(**inputs)[row.output]
    term, patches = merging_of(model).method.loss_term(states[0]), states[0].num_tokens - row.anatomy.prefix
    torch.manual_seed(7)
    noise = {layer: -torch.empty(2, patches, 2, dtype=torch.float64).exponential_().log() for layer in layers}
    slope = torch.randn(output.shape, generator=torch.Generator().manual_seed(4))
    ((output * slope).sum() + term).backward()

    weights = {name: value.requires_grad_() for name, value in weights_of(model).items()}
    misses = []
    for image in range(2):
        own = replace(reduction, steps=[None] * 3, noise={layer: each[image] for layer, each in noise.items()})
        outputs, trail = slow_model.run(weights, row.anatomy, one(inputs, image), own)
        assert_same_tokens(trace, image, trail)
        assert all((trail[layer].kept.detach() < 0.5).any() for layer in layers)
        torch.testing.assert_close(of_image(output, image, 2), outputs[row.output], atol=1e-6, rtol=1e-6)
        real = int(inputs["pixel_attention_mask"][image].sum()) if "pixel_attention_mask" in inputs else patches
        for stage, layer in enumerate(layers, start=1):
            share = trail[layer].kept[row.anatomy.prefix :].sum() / real
            misses.append((config.keep_rate**stage - share) ** 2)
        (outputs[row.output] * of_image(slope, image, 2)).sum().backward(retain_graph=True)
    expected_term = 2 * sum(misses) / len(misses)
    torch.testing.assert_close(term, expected_term, atol=1e-9, rtol=1e-6)
    expected_term.backward()
    assert assert_same_gradients(model, weights) == 10 * len(layers)


@pytest.mark.parametrize("method", methods.METHODS)
@torch.no_grad()
def test_a_real_model_equals_the_slow_reference(method: str, shared: Path, deit_tiny_folder: Path) -> None:
    """The published DeiT-tiny, twelve layers of 197 tokens, on two photographs."""
    config, reduction = methods.METHODS[method].real
    model = AutoModelForImageClassification.from_pretrained(deit_tiny_folder, merge=config).double()
    files = sorted((shared / "assets" / "images" / "dev").glob("*.jpg"))[:2]
    processor = ViTImageProcessorPil.from_pretrained(deit_tiny_folder)
    pixels = processor([Image.open(file).convert("RGB") for file in files], return_tensors="pt")["pixel_values"]
    inputs = {"pixel_values": pixels.double()}
    with model.trace_merging() as trace:
        output = model(**inputs)
    anatomy = vit_like("vit.", first_token_logits("vit.layernorm", 1e-6), eps=1e-6, heads=3)
    for image in range(2):
        outputs, trail = slow_model.run(weights_of(model), anatomy, one(inputs, image), reduction)
        assert_same_tokens(trace, image, trail)
        assert_same_outputs(output, image, outputs, trail[-1])
