"""Layers whose weights, functions or arguments are not the usual ones: by their modules where those would differ."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fused_vit import by_modules, close, needs_fused_layers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dtem_hf import DTEMConfig, ToMeConfig, attach


pytestmark = needs_fused_layers


def to_buffer(module: Any, name: str) -> None:
    value = getattr(module, name).detach() + 1
    delattr(module, name)
    module.register_buffer(name, value)


def to_tensor(module: Any, name: str) -> None:
    value = getattr(module, name).detach() + 1
    delattr(module, name)
    setattr(module, name, value)


@pytest.mark.parametrize("change", [to_buffer, to_tensor])
@pytest.mark.parametrize("path", ["mlp.fc1.bias", "layernorm_before.bias", "layernorm_after.weight"])
@torch.no_grad()
def test_what_is_no_parameter_counts_all_the_same(
    small_vit: Any, small_pixels: Tensor, ran: list[Any], path: str, change: Callable[..., None]
) -> None:
    model = attach(small_vit, ToMeConfig(r=4))
    before = model(small_pixels).logits
    ran.clear()
    module, _, name = path.rpartition(".")
    for layer in model.vit.layers:
        change(layer.get_submodule(module), name)
    changed = model(small_pixels).logits
    assert not ran and not torch.allclose(changed, before, atol=1e-3)
    assert torch.equal(changed, by_modules(lambda: model(small_pixels).logits))


@torch.no_grad()
def test_maps_and_norms_without_biases_or_weights_need_none(
    small_vit: Any, small_pixels: Tensor, ran: list[Any]
) -> None:
    model = attach(small_vit, ToMeConfig(r=4))
    for layer in model.vit.layers:
        layer.mlp.fc1 = nn.Linear(48, 96, bias=False)
        layer.layernorm_after = nn.LayerNorm(48, elementwise_affine=False)
        layer.layernorm_before = nn.LayerNorm(48, bias=False)
    found = model(small_pixels).logits
    assert len(ran) == 3
    close(found, by_modules(lambda: model(small_pixels).logits))


@torch.no_grad()
def test_weights_that_are_not_there_are_asked_for_by_their_modules(small_vit: Any, small_pixels: Tensor) -> None:
    """As where a sharded model has freed them."""
    model = attach(small_vit, ToMeConfig(r=4))
    model.vit.layers[1].mlp.fc1.weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="storage"):
        model(small_pixels)


@pytest.mark.parametrize("kind", ["wrapped", "compiled"])
@torch.no_grad()
def test_attention_functions_that_bear_the_name_of_the_stock_one_are_called(
    small_vit: Any, small_pixels: Tensor, ran: list[Any], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    model = attach(small_vit, ToMeConfig(r=4))
    expected = model(small_pixels).logits
    ran.clear()
    calls: list[None] = []

    @functools.wraps(sdpa_attention_forward)
    def mine(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return sdpa_attention_forward(*args, **kwargs)

    function = mine if kind == "wrapped" else torch.compile(sdpa_attention_forward, backend="eager")
    mapping = ALL_ATTENTION_FUNCTIONS._global_mapping
    monkeypatch.setitem(mapping, "sdpa", mapping["sdpa"])
    AttentionInterface.register("sdpa", function)
    close(model(small_pixels).logits, expected)
    assert not ran and len(calls) == (3 if kind == "wrapped" else 0)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (F, "linear"),
        (F, "layer_norm"),
        (F, "scaled_dot_product_attention"),
        (nn.Linear, "forward"),
        (nn.LayerNorm, "forward"),
        (nn.Module, "__call__"),
    ],
)
@torch.no_grad()
def test_functions_of_torch_that_somebody_replaced_are_called(
    small_vit: Any, small_pixels: Tensor, ran: list[Any], monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    """As libraries of faster attention do for everything that runs."""
    model = attach(small_vit, ToMeConfig(r=4))
    expected = model(small_pixels).logits
    ran.clear()
    calls, stock = [], getattr(owner, name)

    def mine(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return stock(*args, **kwargs)

    monkeypatch.setattr(owner, name, mine)
    close(model(small_pixels).logits, expected)
    assert calls and not ran


@torch.no_grad()
def test_classes_with_a_call_of_their_own_are_called(small_vit: Any, small_pixels: Tensor, ran: list[Any]) -> None:
    model = attach(small_vit, ToMeConfig(r=4))
    before = model(small_pixels).logits
    ran.clear()
    kind = type(model.vit.layers[0].mlp)

    def doubled(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * kind.__call__(self, *args, **kwargs)

    model.vit.layers[1].mlp.__class__ = type("Derived", (kind,), {"__call__": doubled})
    assert not torch.allclose(model(small_pixels).logits, before, atol=1e-3) and len(ran) == 2


@torch.no_grad()
def test_what_was_recorded_once_is_no_hindrance_later(small_vit: Any, small_pixels: Tensor, ran: list[Any]) -> None:
    """transformers' recorders stay on the modules."""
    model = attach(small_vit, ToMeConfig(r=4))
    model.set_attn_implementation("eager")  # which has weights to record
    expected = model(small_pixels).logits
    recorded = model(small_pixels, output_attentions=True)
    assert len(ran) == 3 and len(recorded.attentions) == 3
    ran.clear()
    assert torch.equal(model(small_pixels).logits, expected) and len(ran) == 3
    ran.clear()
    hidden = model(small_pixels, output_hidden_states=True).hidden_states
    assert [x.shape[1] for x in hidden] == [65, 61, 57, 53] and len(ran) == 3
    model.config.output_attentions = True
    ran.clear()
    assert len(model(small_pixels).attentions) == 3 and not ran


@pytest.mark.parametrize("switch", ["output_attentions", "output_hidden_states", "use_cache"])
@pytest.mark.parametrize("value", [False, None])
@torch.no_grad()
def test_switches_that_are_off_ask_for_nothing(
    small_vit: Any, small_pixels: Tensor, ran: list[Any], switch: str, value: Any
) -> None:
    model = attach(small_vit, DTEMConfig(r=4))
    expected = model(small_pixels).logits
    ran.clear()
    assert torch.equal(model(small_pixels, **{switch: value}).logits, expected) and len(ran) == 3
