"""Operations one after the other: what the modules give, and only where nobody would notice the difference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dtem_hf import DTEMConfig, ToMeConfig, attach
from dtem_hf.backbones import vit


Make = Callable[..., Any]


@pytest.fixture
def lean_layers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers that ran lean."""
    seen: list[int] = []
    original = vit.lean_layer

    def lean_layer(layer: Any, *args: Any) -> Any:
        found = original(layer, *args)
        if found is not None:
            seen.append(layer.merge_index)
        return found

    monkeypatch.setattr(vit, "lean_layer", lean_layer)
    return seen


def without(model: Any, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return model(pixel_values=pixels).logits


@pytest.mark.parametrize("config", [ToMeConfig(r=5), DTEMConfig(r=5), ToMeConfig(r=[0, 7, 0, 0])])
def test_equals_the_modules(make_classifier: Make, pixels: Tensor, lean_layers: list[int], config: Any) -> None:
    model = attach(make_classifier(), config).eval()
    expected = model(pixel_values=pixels).logits.detach()  # with gradients, by the modules
    assert lean_layers == []
    torch.testing.assert_close(without(model, pixels), expected, atol=1e-5, rtol=1e-5)
    # The last computes the prefix alone, and what is in front of the first merge is as in the plain model.
    assert lean_layers == [i for i in (0, 1, 2) if i or model.merge_plan().reductions[0]]


def test_many_images_and_other_attention_take_the_modules(
    make_classifier: Make, pixels: Tensor, lean_layers: list[int]
) -> None:
    model = attach(make_classifier(), ToMeConfig(r=5)).eval()
    without(model, pixels[:1].expand(17, -1, -1, -1))
    assert lean_layers == []
    model.set_attn_implementation("eager")
    without(model, pixels)
    assert lean_layers == []


@pytest.mark.parametrize("place", ["layernorm_before", "attention.o_proj", "attention.v_proj", "mlp", "mlp.fc2"])
def test_a_part_with_a_hook_runs_as_a_module(
    make_classifier: Make, pixels: Tensor, lean_layers: list[int], place: str
) -> None:
    model = attach(make_classifier(), ToMeConfig(r=5)).eval()
    expected, seen = without(model, pixels), []
    lean_layers.clear()
    part = model.vit.layers[1].get_submodule(place)
    handle = part.register_forward_hook(lambda *args: seen.append(args[2]))
    torch.testing.assert_close(without(model, pixels), expected, atol=1e-5, rtol=1e-5)
    handle.remove()
    assert len(seen) == 1 and lean_layers == [0, 2]


def test_parts_that_somebody_has_exchanged_are_run(
    make_classifier: Make, pixels: Tensor, lean_layers: list[int]
) -> None:
    class Loud(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 3 * super().forward(x)

    model = attach(make_classifier(), ToMeConfig(r=5)).eval()
    without(model, pixels)
    model.vit.layers[0].mlp.fc1.__class__ = Loud
    model.vit.layers[1].layernorm_after = nn.Identity()
    lean_layers.clear()
    expected = model(pixel_values=pixels).logits.detach()
    torch.testing.assert_close(without(model, pixels), expected, atol=1e-5, rtol=1e-5)
    assert lean_layers == [2]


def test_attentions_and_hidden_states_are_still_recorded(make_classifier: Make, pixels: Tensor) -> None:
    model = attach(make_classifier(attn_implementation="eager"), ToMeConfig(r=5)).eval()
    with torch.no_grad():
        output = model(pixel_values=pixels, output_attentions=True, output_hidden_states=True)
    assert len(output.attentions) == 4 and len(output.hidden_states) == 5
    model = attach(make_classifier(), ToMeConfig(r=5)).eval()
    with torch.no_grad():
        states = model(pixel_values=pixels, output_hidden_states=True).hidden_states
    assert [x.shape[1] for x in states] == [x.shape[1] for x in output.hidden_states]
    for ours, theirs in zip(states, output.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
