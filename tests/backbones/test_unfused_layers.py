"""Where a layer runs by its modules instead of one call: whatever is not stock about them, or watches them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from family_table import FAMILIES, inputs_of, make
from fused_vit import SMALL, by_modules, close, needs_fused_layers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import ViTConfig, ViTForImageClassification
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.vit import modeling_vit

from dtem_hf import DTEMConfig, ToMeConfig, attach
from dtem_hf.backbones import find_backbone
from dtem_hf.backbones.open_attention import attention_function
from dtem_hf.reducers import Reducer
from dtem_hf.reducers.tome import ToMeReducer


pytestmark = needs_fused_layers

WATCHED = [
    *("layernorm_before", "attention", "attention.q_proj", "attention.o_proj", "dropout"),
    *("layernorm_after", "mlp", "mlp.fc1", "mlp.activation_fn", "mlp.fc2"),
]


@pytest.mark.parametrize("name", WATCHED)
@torch.no_grad()
def test_hooks_see_what_they_always_saw(small_vit: Any, small_pixels: Tensor, ran: list[Any], name: str) -> None:
    model = attach(small_vit, ToMeConfig(r=4))
    expected = model(small_pixels).logits
    module = model.vit.layers[1].get_submodule(name)
    for register in (module.register_forward_hook, module.register_forward_pre_hook):
        seen: list[Any] = []
        ran.clear()
        handle = register(lambda module, *rest, seen=seen: seen.append(rest))
        close(model(small_pixels).logits, expected)
        handle.remove()
        assert seen and len(ran) == 2
    if name != "dropout":
        add_hook_to_module(module, Doubling())
        assert not torch.allclose(model(small_pixels).logits, expected, atol=1e-4)


class Doubling(ModelHook):
    """Stands for what accelerate puts around forward passes."""

    def post_forward(self, module: Any, output: Any) -> Any:
        return (output[0] * 2, *output[1:]) if isinstance(output, tuple) else output * 2


@torch.no_grad()
def test_hooks_of_layers_and_what_is_recorded(small_vit: Any, small_pixels: Tensor, ran: list[Any]) -> None:
    model = attach(small_vit, ToMeConfig(r=4))
    seen: list[Tensor] = []
    handle = model.vit.layers[1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(small_pixels)
    handle.remove()
    assert len(ran) == 3 and [tuple(x.shape) for x in seen] == [(2, 57, 48)]  # as it is called itself
    found = model(small_pixels, output_hidden_states=True, output_attentions=True)
    assert [x.shape[1] for x in found.hidden_states] == [65, 61, 57, 53]
    expected = by_modules(lambda: model(small_pixels, output_hidden_states=True))
    for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        close(ours, theirs)


@torch.no_grad()
def test_hooks_of_all_modules_and_lora_are_run(small_vit: Any, small_pixels: Tensor, ran: list[Any]) -> None:
    model = attach(small_vit, ToMeConfig(r=4))
    expected = model(small_pixels).logits
    ran.clear()
    seen: list[Any] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    close(model(small_pixels).logits, expected)
    handle.remove()
    assert model.vit.layers[1].mlp.fc1 in seen and not ran
    adapted = get_peft_model(model, LoraConfig(target_modules=["fc1", "q_proj"], init_lora_weights=False)).eval()
    changed = adapted(small_pixels).logits
    assert not ran and not torch.allclose(changed, expected, atol=1e-4)
    close(adapted.merge_and_unload()(small_pixels).logits, changed)
    assert ran


@torch.no_grad()
def test_dropout_that_was_left_on_is_run(small_pixels: Tensor, ran: list[Any]) -> None:
    """Dropout at inference, on its own modules alone, is how some estimate uncertainty."""
    config = ViTConfig(**SMALL, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    model = attach(ViTForImageClassification(config).eval(), ToMeConfig(r=4))
    assert torch.equal(model(small_pixels).logits, model(small_pixels).logits) and ran
    first = model.vit.layers[0]
    for switch in (first.dropout, first.attention):
        switch.train()
        assert not torch.equal(model(small_pixels).logits, model(small_pixels).logits)
        switch.eval()
    first.dropout = AlwaysOn(0.5).eval()
    assert not torch.equal(model(small_pixels).logits, model(small_pixels).logits)


class AlwaysOn(nn.Dropout):
    """Dropout as people write it who want it at inference."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, training=True)


class Shifted(nn.LayerNorm):
    """A norm with a forward pass of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.3


def shifted(norm: nn.LayerNorm) -> nn.LayerNorm:
    return Shifted(norm.normalized_shape, norm.eps)


def two_maps(linear: nn.Linear) -> nn.Module:
    return nn.Sequential(nn.Linear(linear.in_features, 8), nn.Linear(8, linear.out_features))


REPLACED = {
    "mlp.fc1": two_maps,
    "attention.v_proj": two_maps,
    "attention.o_proj": two_maps,
    "layernorm_before": shifted,
    "layernorm_after": shifted,
    "mlp.activation_fn": lambda activation: nn.ReLU(),
}


@pytest.mark.parametrize("path", REPLACED)
@torch.no_grad()
def test_other_modules_in_their_places_are_run(
    small_vit: Any, small_pixels: Tensor, ran: list[Any], path: str
) -> None:
    model = attach(small_vit, ToMeConfig(r=4))
    before = model(small_pixels).logits
    parent, _, name = path.rpartition(".")
    for layer in model.vit.layers:
        part = layer.get_submodule(parent) if parent else layer
        setattr(part, name, REPLACED[path](getattr(part, name)))
    ran.clear()
    assert not torch.allclose(model(small_pixels).logits, before, atol=1e-3) and not ran


@torch.no_grad()
def test_forwards_of_ones_own_are_run(small_vit: Any, small_pixels: Tensor, ran: list[Any]) -> None:
    model = attach(small_vit, ToMeConfig(r=4))
    before = model(small_pixels).logits
    ran.clear()
    kind = type(model.vit.layers[0].mlp)

    def doubled(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * kind.forward(self, *args, **kwargs)

    for layer in model.vit.layers:
        layer.mlp.__class__ = type("Derived", (kind,), {"forward": doubled})
    assert not torch.allclose(model(small_pixels).logits, before, atol=1e-3) and not ran
    for layer in model.vit.layers:
        layer.mlp.__class__ = type("Derived", (kind,), {})  # as FSDP2 derives classes
    close(model(small_pixels).logits, before)
    assert len(ran) == 3


@torch.no_grad()
def test_dtypes_weights_that_are_strided_and_quantised_ones(
    small_vit: Any, small_pixels: Tensor, ran: list[Any]
) -> None:
    model = attach(small_vit, ToMeConfig(r=4))
    expected = model(small_pixels).logits
    ran.clear()
    for layer in model.vit.layers:
        layer.mlp.fc1.weight = nn.Parameter(layer.mlp.fc1.weight.t().contiguous().t())
    close(model(small_pixels).logits, expected)
    assert not ran
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    quantised(small_pixels)
    model.to(torch.bfloat16)(small_pixels.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.float()(small_pixels)
    assert not ran


def test_exported_and_trained_models_hold_stock_operations(
    small_vit: Any, small_pixels: Tensor, ran: list[Any]
) -> None:
    model = attach(small_vit, ToMeConfig(r=4))
    model(small_pixels).logits.sum().backward()
    assert model.vit.layers[1].mlp.fc1.weight.grad is not None
    with torch.no_grad():
        program = torch.export.export(model, (), {"pixel_values": small_pixels})
        model.train()(small_pixels)
        assert not ran
        expected = model.eval()(small_pixels).logits
    assert ran
    close(program.module()(pixel_values=small_pixels).logits, expected)


def to_multi_query(model: Any) -> None:
    """Modules broadcast one head of keys and values."""
    for layer in model.vit.layers:
        layer.attention.k_proj, layer.attention.v_proj = nn.Linear(48, 16), nn.Linear(48, 16)


def to_sparse(model: Any) -> None:
    for layer in model.vit.layers:
        fc1 = layer.mlp.fc1
        fc1.weight = nn.Parameter(fc1.weight.detach().to_sparse_csr(), requires_grad=False)


def to_narrow(model: Any) -> None:
    """What the first product makes does not fit the second."""
    for layer in model.vit.layers:
        layer.mlp.fc2 = nn.Linear(200, 48)


def outcome(run: Callable[[], Any]) -> Any:
    """What a model says, or what is wrong with it."""
    try:
        return run().logits
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("change", [to_multi_query, to_sparse, to_narrow])
@pytest.mark.filterwarnings("ignore:Sparse CSR")
@torch.no_grad()
def test_weights_of_other_shapes_and_layouts_are_left_to_modules(
    small_vit: Any, small_pixels: Tensor, ran: list[Any], change: Any
) -> None:
    model = attach(small_vit, DTEMConfig(r=4))
    change(model)
    found, expected = outcome(lambda: model(small_pixels)), by_modules(lambda: outcome(lambda: model(small_pixels)))
    assert not ran
    if isinstance(expected, Tensor):
        close(found, expected)
    else:
        assert found is expected is RuntimeError


@torch.no_grad()
def test_a_layer_scale_that_is_one_number(ran: list[Any]) -> None:
    model = attach(make("dinov2"), ToMeConfig(r=9))
    backbone, encoder = find_backbone(model)
    for layer in backbone.layers(encoder):
        layer.layer_scale1.lambda1 = nn.Parameter(torch.tensor([0.5]))  # type: ignore[union-attr, assignment]

    def run() -> Tensor:
        return model(**inputs_of("dinov2", 2))[FAMILIES["dinov2"].output]

    found = run()
    assert not ran
    close(found, by_modules(run))


@pytest.mark.parametrize("change", [lambda x: torch.cat([x, x[:, :5]], dim=1), lambda x: x[:, :9]])
@torch.no_grad()
def test_tokens_that_a_hook_adds_or_takes_are_the_modules_affair(
    small_vit: Any, small_pixels: Tensor, ran: list[Any], change: Any
) -> None:
    model = attach(small_vit, ToMeConfig(r=4))
    model.vit.layers[1].register_forward_pre_hook(lambda _, inputs: (change(inputs[0]), *inputs[1:]))
    assert outcome(lambda: model(small_pixels)) is RuntimeError
    assert len(ran) == 1
    assert by_modules(lambda: outcome(lambda: model(small_pixels))) is RuntimeError


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_attention_that_somebody_put_in_its_place_is_called(
    small_vit: Any, small_pixels: Tensor, ran: list[Any], monkeypatch: pytest.MonkeyPatch, attn_implementation: str
) -> None:
    small_vit.set_attn_implementation(attn_implementation)
    model = attach(small_vit, ToMeConfig(r=4))
    expected = model(small_pixels).logits
    assert len(ran) == 3
    ran.clear()
    calls: list[Any] = []
    stock = attention_function(model.vit.layers[0].attention)

    def mine(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return stock(*args, **kwargs)

    if attn_implementation == "sdpa":
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", mine)
    else:
        monkeypatch.setattr(modeling_vit, "eager_attention_forward", mine)
    close(model(small_pixels).logits, expected)
    assert len(calls) == 3 and not ran


class Linears(TorchFunctionMode):
    """Counts calls of one function of torch's."""

    times = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.times += function is F.linear
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def test_functions_that_are_overridden_are_called(small_vit: Any, small_pixels: Tensor, ran: list[Any]) -> None:
    model = attach(small_vit, ToMeConfig(r=4))
    with Linears() as counted:
        model(small_pixels)
    assert counted.times == 3 * 6 + 1 and not ran


@torch.no_grad()
def test_a_reducer_that_merges_in_another_way_is_run(small_vit: Any, small_pixels: Tensor, ran: list[Any]) -> None:
    class Reversed(ToMeReducer):
        """Compares by keys that are turned around."""

        def metric(self, *args: Any) -> Any:
            keys, heads = super().metric(*args)
            return keys.flip(1), heads

    model = attach(small_vit, ToMeConfig(r=9))
    before = model(small_pixels).logits
    assert len(ran) == 3
    ran.clear()
    for layer in model.vit.layers:
        layer.merge_reducer = Reversed(model.merge_config, find_backbone(model)[0])
    assert not torch.allclose(model(small_pixels).logits, before)
    assert len(ran) == 1  # the last, of which CLS alone is read


def test_who_reduces_anew_says_anew_what_may_be_left_out() -> None:
    class Counting(ToMeReducer):
        """Does something in every layer."""

        def reduce(self, *args: Any) -> Any:
            return super().reduce(*args)

    assert Counting.runs_in_every_layer and not ToMeReducer.runs_in_every_layer
    assert Counting.metric_source is Reducer.metric_source is not ToMeReducer.metric_source
