"""Layers that run their linear maps as products: the same output, from the weights of now, and no hook passed by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from family_table import FAMILIES, NESTED, inputs_of, make
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

from dtem_hf import DTEMConfig, ToMeConfig, attach, detach
from dtem_hf.backbones.open_mlp import OpenMLP
from dtem_hf.ops import fused_layer, products


pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
# Their MLPs have other parts.
OTHER_MLPS = ("data2vec", "dinov3", "swiglu", *NESTED)


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The weights that were multiplied with, appended as models run; sizes that would not pay are taken as well."""
    weights: list[Any] = []
    multiply = products.multiply

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: str | None = None) -> Tensor:
        weights.append(weight)
        return multiply(x, weight, bias, gelu)

    monkeypatch.setattr(fused_layer, "can_run", lambda x: False)  # which would run all of a layer, by itself
    monkeypatch.setattr(products, "multiply", counted)
    monkeypatch.setattr(products, "is_available", lambda: True)  # on any processor
    for name in ("_SMALLEST_WEIGHT", "_LARGE_WEIGHT", "_FEWEST_PRODUCTS", "_FEWEST_ROWS"):
        monkeypatch.setattr(products, name, 0)
    return weights


def without_products(run: Callable[[], Tensor]) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "is_available", lambda: False)
        return run()


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_family_gives_what_its_modules_give(family: str, count: list[Any]) -> None:
    model = make(family)
    plain = sum(type(module).__name__.endswith("MLP") for module in model.modules())
    attach(model, ToMeConfig(r=9))

    def run() -> Tensor:
        return model(**inputs_of(family, 2))[FAMILIES[family].output]

    expected = without_products(run)
    assert not count
    close(run(), expected)
    opened = [module for module in model.modules() if isinstance(module, OpenMLP)]
    assert bool(opened) == (not any(name in family for name in OTHER_MLPS)) and len(opened) <= plain
    for mlp in opened:
        assert any(weight is mlp.fc1.weight for weight in count) and any(weight is mlp.fc2.weight for weight in count)


@pytest.fixture
def wide() -> ViTForImageClassification:
    """Wide enough that products pay with the sizes as they are."""
    config = ViTConfig(
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=2,
        num_attention_heads=6,
        image_size=32,
        patch_size=4,
        num_labels=5,
    )
    torch.manual_seed(0)
    return ViTForImageClassification(config).eval()


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_weights_are_those_of_now(wide: Any, pixels: Tensor, count: list[Any]) -> None:
    """A copy made earlier would be stale, and what writes through `.data` leaves no trace (PEFT's merge does)."""
    model = attach(wide, DTEMConfig(r=4))
    before = model(pixels).logits
    for layer in model.vit.layers:
        for linear in (layer.mlp.fc1, layer.mlp.fc2, layer.attention.q_proj):
            linear.weight.data.mul_(1.5)
    after = model(pixels).logits
    assert not torch.allclose(before, after, atol=1e-3) and count
    close(after, without_products(lambda: model(pixels).logits))


@torch.no_grad()
def test_layers_with_nothing_merged_before_them_run_their_modules(wide: Any, pixels: Tensor, count: list[Any]) -> None:
    plain = wide(pixels).logits
    assert torch.equal(attach(wide, ToMeConfig(r=0))(pixels).logits, plain) and not count
    model = attach(wide, ToMeConfig(r=4))
    with model.unmerged():
        assert torch.equal(model(pixels).logits, plain) and not count
    model(pixels)
    first, last = model.vit.layers
    ran = {id(weight) for weight in count}
    assert id(first.attention.q_proj.weight) not in ran
    assert {id(first.mlp.fc1.weight), id(first.mlp.fc2.weight), id(last.attention.k_proj.weight)} <= ran
    assert type(detach(model).vit.layers[0].mlp).__mro__[1] is not OpenMLP


@pytest.mark.parametrize("name", ["mlp.fc1", "mlp.fc2", "mlp.activation_fn", "attention.q_proj", "attention.o_proj"])
@torch.no_grad()
def test_hooks_see_what_they_always_saw(wide: Any, pixels: Tensor, count: list[Any], name: str) -> None:
    model = attach(wide, ToMeConfig(r=4))
    expected = model(pixels).logits
    module = model.vit.layers[1].get_submodule(name)
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    close(model(pixels).logits, expected)
    handle.remove()
    add_hook_to_module(module, _Doubling())
    assert len(seen) == 1 and not torch.allclose(model(pixels).logits, expected, atol=1e-4)


class _Doubling(ModelHook):
    """Stands for what accelerate puts around forward passes."""

    def post_forward(self, module: Any, output: Tensor) -> Tensor:
        return output * 2


@torch.no_grad()
def test_hooks_of_all_modules_and_lora_are_run(wide: Any, pixels: Tensor, count: list[Any]) -> None:
    model = attach(wide, ToMeConfig(r=4))
    expected = model(pixels).logits
    seen: list[Any] = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    close(model(pixels).logits, expected)
    handle.remove()
    assert model.vit.layers[1].mlp.fc1 in seen
    adapted = get_peft_model(model, LoraConfig(target_modules=["fc1", "q_proj"], init_lora_weights=False)).eval()
    count.clear()
    changed = adapted(pixels).logits
    assert not count and not torch.allclose(changed, expected, atol=1e-4)
    close(adapted.merge_and_unload()(pixels).logits, changed)
    assert count


@torch.no_grad()
def test_dropout_that_was_left_on_is_run(pixels: Tensor) -> None:
    """Dropout at inference, on its own modules alone, is how some estimate uncertainty."""
    config = ViTConfig(**{**ViTConfig().to_dict(), **_SMALL, "hidden_dropout_prob": 0.5})
    model = attach(ViTForImageClassification(config).eval(), ToMeConfig(r=4))
    assert torch.equal(model(pixels).logits, model(pixels).logits)
    for layer in model.vit.layers:
        layer.dropout.train()
    assert not torch.equal(model(pixels).logits, model(pixels).logits)
    for layer in model.vit.layers:
        layer.dropout = AlwaysOn(0.5).eval()
    assert not torch.equal(model(pixels).logits, model(pixels).logits)


class AlwaysOn(nn.Dropout):
    """Dropout as people write it who want it at inference."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, training=True)


_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 4,
}


def test_exported_and_trained_models_hold_stock_operations(wide: Any, pixels: Tensor, count: list[Any]) -> None:
    model = attach(wide, ToMeConfig(r=4))
    model(pixels).logits.sum().backward()
    assert not count and model.vit.layers[1].mlp.fc1.weight.grad is not None
    with torch.no_grad():
        program = torch.export.export(model, (), {"pixel_values": pixels})
        assert not count
        assert "mkldnn" not in program.graph_module.code
        close(program.module()(pixel_values=pixels).logits, model(pixels).logits)
    assert count


class Flat(nn.Linear):
    """A linear map with its weight in one row, as a sharded one may lie."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features)
        self.weight, self.bias = nn.Parameter(linear.weight.detach().flatten()), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.view(-1, self.in_features), self.bias)


REPLACED = {
    "two maps": lambda linear: nn.Sequential(nn.Linear(linear.in_features, 8), nn.Linear(8, linear.out_features)),
    "a flat weight": Flat,
    "no weight": lambda linear: nn.Sequential(linear, nn.Identity()),
}


@pytest.mark.parametrize("path", ["mlp.fc1", "mlp.fc2", "attention.q_proj", "attention.o_proj"])
@pytest.mark.parametrize("kind", REPLACED)
@torch.no_grad()
def test_other_modules_in_the_place_of_linear_maps_are_run(
    wide: Any, pixels: Tensor, count: list[Any], path: str, kind: str
) -> None:
    model = attach(wide, ToMeConfig(r=4))
    for layer in model.vit.layers:
        parent, _, name = path.partition(".")
        part = layer.get_submodule(parent)
        setattr(part, name, REPLACED[kind](getattr(part, name)))
    found = model(pixels).logits
    assert count  # of the other part
    close(found, without_products(lambda: model(pixels).logits))


@torch.no_grad()
def test_dynamic_quantisation_is_run(wide: Any, pixels: Tensor, count: list[Any]) -> None:
    model = attach(wide, ToMeConfig(r=4))
    expected = model(pixels).logits
    count.clear()
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert 0 < (quantised(pixels).logits - expected).abs().max() < 0.2 and not count


@torch.no_grad()
def test_a_bias_that_is_strided_is_read_as_it_lies(wide: Any, pixels: Tensor, count: list[Any]) -> None:
    model = attach(wide, ToMeConfig(r=4))
    for layer in model.vit.layers:
        layer.mlp.fc1.bias = nn.Parameter(torch.randn(2 * 1536)[::2])
        layer.attention.k_proj.bias = nn.Parameter(torch.randn(1).expand(384))
    found = model(pixels).logits
    assert count
    close(found, without_products(lambda: model(pixels).logits))


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_a_class_that_was_derived_once_more_and_forwards_of_ones_own(
    wide: Any, pixels: Tensor, count: list[Any], attn_implementation: str
) -> None:
    """FSDP2 derives classes in a module of its own; others put a `forward` on a module, with the stock arguments."""
    wide.set_attn_implementation(attn_implementation)
    model = attach(wide, ToMeConfig(r=4))
    expected = model(pixels).logits
    first, last = model.vit.layers
    stock = type(first.attention)
    for part in (first.attention, last.attention, first.mlp):
        part.__class__ = type("Derived", (type(part),), {"__module__": "collections"})
    close(model(pixels).logits, expected)
    last.attention.__class__ = stock
    forwards = last.attention.forward, last.mlp.forward
    last.attention.forward = lambda hidden_states, attention_mask=None: forwards[0](hidden_states, attention_mask)
    last.mlp.forward = lambda hidden_states: forwards[1](hidden_states)
    close(model(pixels).logits, expected)


@torch.no_grad()
def test_training_takes_no_products_where_gradients_are_off_for_now(
    wide: Any, pixels: Tensor, count: list[Any]
) -> None:
    """Reentrant checkpointing runs layers without gradients first, and with them later must come to the same bits."""
    model = attach(wide, ToMeConfig(r=4)).train()
    model(pixels)
    assert not count
