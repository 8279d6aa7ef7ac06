"""Layers that run as one call: what their modules give, in every family, from the weights of now."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_table import FAMILIES, NESTED, inputs_of, make
from fused_vit import by_modules, close, needs_fused_layers
from torch import Tensor

from dtem_hf import DTEMConfig, EViTConfig, ToMeConfig, attach
from dtem_hf.backbones import find_backbone


pytestmark = needs_fused_layers
# Their attention has more in it (rotation, biases for pairs of tokens, one product for all), or their tokens padding.
RUN_BY_MODULES = ("beit", "data2vec", "dinov3", "blip", "siglip2", *NESTED)
METHODS = {
    "tome": lambda: ToMeConfig(r=9),
    "tome, no sizes": lambda: ToMeConfig(r=9, proportional_attention=False),
    "tome, some layers": lambda: ToMeConfig(r=[0, 9, 0, 5]),
    "dtem": lambda: DTEMConfig(r=9, init="random"),
    "dtem, aggregation": lambda: DTEMConfig(r=9, learn_exponents=True, learn_norms=True),
    "evit": lambda: EViTConfig(keep_rate=0.7, layers=[1]),
}


def count_of_layers(model: Any) -> int:
    backbone, encoder = find_backbone(model)
    return len(backbone.layers(encoder))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_family_gives_what_its_modules_give(family: str, method: str, ran: list[Any]) -> None:
    if method == "evit" and not FAMILIES[family].cls:
        pytest.skip("EViT needs a CLS token")
    model = attach(make(family), METHODS[method]())
    generator = torch.Generator().manual_seed(0)
    for parameter in model.merge_parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)

    def run() -> Tensor:
        return model(**inputs_of(family, 2))[FAMILIES[family].output]

    expected = by_modules(run)
    assert not ran
    close(run(), expected)
    layers = count_of_layers(model)
    # The first layers of some merge nothing, and one of EViT's merges by what only modules know.
    plain = {"tome, some layers": 1, "evit": 2}.get(method, 0)
    assert len(ran) == (0 if family.startswith(RUN_BY_MODULES) else layers - plain)


@pytest.mark.parametrize("method", ["tome, some layers", "dtem, aggregation", "evit"])
@pytest.mark.parametrize("family", ["vit", "deit", "siglip", "clip"])
@torch.no_grad()
def test_traces_say_what_they_say_of_modules(family: str, method: str, ran: list[Any]) -> None:
    if method == "evit" and not FAMILIES[family].cls:
        pytest.skip("EViT needs a CLS token")
    model = attach(make(family), METHODS[method]())

    def traced() -> Any:
        with model.trace_merging() as trace:
            model(**inputs_of(family, 2))
        return trace

    expected, found = by_modules(traced), traced()
    assert ran
    for name in ("source_maps", "sizes"):
        for ours, theirs in zip(getattr(found, name), getattr(expected, name), strict=True):
            assert torch.equal(ours, theirs)


@torch.no_grad()
def test_weights_are_those_of_now(small_vit: Any, small_pixels: Tensor, ran: list[Any]) -> None:
    model = attach(small_vit, DTEMConfig(r=9))
    before = model(small_pixels).logits
    for layer in model.vit.layers:
        for part in (layer.mlp.fc1, layer.attention.k_proj, layer.layernorm_after):
            part.weight.data.mul_(1.5)
    model.vit.merge_embedding.layers[0].weight.data.neg_()
    after = model(small_pixels).logits
    assert len(ran) == 6 and not torch.allclose(before, after, atol=1e-3)
    close(after, by_modules(lambda: model(small_pixels).logits))


@torch.no_grad()
def test_a_plain_model_and_layers_in_front_of_the_first_merge_run_their_modules(
    small_vit: Any, small_pixels: Tensor, ran: list[Any]
) -> None:
    plain = small_vit(small_pixels).logits
    assert torch.equal(attach(small_vit, ToMeConfig(r=0))(small_pixels).logits, plain) and not ran
    model = attach(small_vit, ToMeConfig(r=[0, 4, 0]))
    with model.unmerged():
        assert torch.equal(model(small_pixels).logits, plain) and not ran
    model(small_pixels)
    later = model.vit.layers[1:]
    assert [id(weights.query.weight) for weights in ran] == [id(layer.attention.q_proj.weight) for layer in later]


@torch.no_grad()
def test_one_image_is_what_it_is_in_a_batch_to_the_last_bit(small_vit: Any, ran: list[Any]) -> None:
    """Behind the convolution, whose sums another library orders."""
    model = attach(small_vit, ToMeConfig(r=9))
    pixels = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    embedded = model.vit.embeddings(pixels)
    hook = model.vit.embeddings.register_forward_hook(lambda module, inputs, output: embedded[chosen])
    chosen = slice(0, 5)
    together = model.vit(pixels).last_hidden_state
    for i in range(5):
        chosen = slice(i, i + 1)
        assert torch.equal(model.vit(pixels[chosen]).last_hidden_state[0], together[i])
    hook.remove()
    assert ran


def test_a_model_that_only_infers_says_so_by_no_grad(small_vit: Any, small_pixels: Tensor, ran: list[Any]) -> None:
    model = attach(small_vit, ToMeConfig(r=4)).requires_grad_(False)
    with torch.inference_mode():
        expected = model(small_pixels).logits
    assert len(ran) == 3
    close(model(small_pixels).logits, expected)


@torch.no_grad()
def test_where_new_tensors_go_by_default_does_not_matter(small_vit: Any, small_pixels: Tensor, ran: list[Any]) -> None:
    model = attach(small_vit, DTEMConfig(r=4, learn_norms=True))
    expected = model(small_pixels).logits
    with torch.device("meta"):
        assert torch.equal(model(small_pixels).logits, expected)
    assert len(ran) == 6


@torch.no_grad()
def test_a_profile_shows_the_calls(small_vit: Any, small_pixels: Tensor) -> None:
    model = attach(small_vit, ToMeConfig(r=4))
    with torch.profiler.profile() as profile:
        model(small_pixels)
    assert {event.key: event.count for event in profile.key_averages()}["dtem_hf::fused_layer"] == 3
