"""Projections in one product: the same numbers, never stale, and nothing that anybody else would see."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dtem_hf import AutoModelForImageClassification, DTEMConfig, ToMeConfig, attach, detach
from dtem_hf.backbones import packing


Make = Callable[..., Any]
Config = DTEMConfig | ToMeConfig


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many linear maps each product of packed weights stood for."""
    seen: list[int] = []
    original = packing.project

    def project(owner: nn.Module, linears: Any, x: Tensor) -> Any:
        found = original(owner, linears, x)
        seen.append(0 if found is None else len(found))
        return found

    monkeypatch.setattr("dtem_hf.backbones.open_attention.project", project)
    return seen


def with_gradients(model: Any, pixels: Tensor) -> Tensor:
    return model(pixel_values=pixels).logits.detach()


def without(model: Any, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return model(pixel_values=pixels).logits


@pytest.mark.parametrize("config, count", [(ToMeConfig(r=5), 3), (DTEMConfig(r=5), 4)])
def test_inference_takes_one_product_and_gives_the_same(
    make_classifier: Make, pixels: Tensor, products: list[int], config: Config, count: int
) -> None:
    model = attach(make_classifier(), config).eval()
    expected = with_gradients(model, pixels)
    assert set(products) == {0}
    products.clear()
    torch.testing.assert_close(without(model, pixels), expected, atol=1e-5, rtol=1e-5)
    assert set(products) == {count}


def test_what_is_changed_in_place_is_seen(make_classifier: Make, pixels: Tensor) -> None:
    model = attach(make_classifier(), DTEMConfig(r=5)).eval()
    without(model, pixels)
    state = {key: torch.randn_like(value) * 0.2 for key, value in model.state_dict().items()}
    changes = [
        lambda: model.vit.layers[1].attention.v_proj.weight.data.mul_(3),
        lambda: nn.init.normal_(model.vit.layers[1].attention.q_proj.bias),
        lambda: model.load_state_dict(state),
        lambda: setattr(model.vit.layers[0].attention.k_proj, "weight", nn.Parameter(torch.randn(32, 32))),
        lambda: model.vit.merge_embedding.layers[0].weight.data.copy_(torch.randn(8, 32)),
    ]
    for change in changes:
        with torch.no_grad():
            change()
        ours = without(model, pixels)
        torch.testing.assert_close(ours, with_gradients(model, pixels), atol=1e-5, rtol=1e-5)


def test_nothing_merged_is_bit_identical_to_the_plain_model(
    make_classifier: Make, pixels: Tensor, products: list[int]
) -> None:
    plain = make_classifier().eval()
    model = attach(copy.deepcopy(plain), ToMeConfig(r=0))
    assert torch.equal(without(model, pixels), without(plain, pixels))
    assert products == []


def test_saving_copying_and_detaching_know_nothing_of_it(
    make_classifier: Make, pixels: Tensor, tmp_path: Path
) -> None:
    model, plain = attach(make_classifier(), DTEMConfig(r=5)).eval(), make_classifier().eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = without(model, pixels)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) and after[key].is_contiguous() for key in after)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(
        without(AutoModelForImageClassification.from_pretrained(tmp_path).eval(), pixels), expected
    )
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(without(torch.load(buffer, weights_only=False), pixels), expected)
    assert torch.equal(without(copy.deepcopy(model), pixels), expected)
    assert torch.equal(without(detach(model), pixels), without(plain, pixels))


def test_a_packed_model_still_learns(make_classifier: Make, pixels: Tensor) -> None:
    """Packed in inference mode, which must not leak; and the optimiser's steps are seen at once."""
    packed, fresh = (attach(make_classifier(), ToMeConfig(r=5)) for _ in range(2))
    with torch.inference_mode():
        packed.eval()(pixel_values=pixels)
    for model in (packed, fresh):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            model(pixel_values=pixels).logits.square().sum().backward()
            optimizer.step()
    for ours, theirs in zip(packed.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(without(packed, pixels), with_gradients(fresh, pixels), atol=1e-5, rtol=1e-5)


def test_weights_that_processes_share_stay_shared(make_classifier: Make, pixels: Tensor, products: list[int]) -> None:
    model = attach(make_classifier().share_memory(), ToMeConfig(r=5)).eval()
    without(model, pixels)
    assert set(products) == {0}
    assert all(p.is_shared() for p in model.parameters())


def test_hooks_on_a_projection_are_called(make_classifier: Make, pixels: Tensor) -> None:
    model = attach(make_classifier(), ToMeConfig(r=5)).eval()
    without(model, pixels)
    seen: list[Tensor] = []
    handle = model.vit.layers[0].attention.v_proj.register_forward_hook(lambda *args: seen.append(args[2]))
    without(model, pixels)
    handle.remove()
    assert len(seen) == 1


def test_maps_that_are_more_than_their_weight_run_by_themselves(make_classifier: Make, pixels: Tensor) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = attach(make_classifier(), ToMeConfig(r=5)).eval()
    without(model, pixels)
    model.vit.layers[2].attention.q_proj.__class__ = Doubled
    torch.testing.assert_close(without(model, pixels), with_gradients(model, pixels), atol=1e-5, rtol=1e-5)


def test_in_bfloat16_and_under_autocast(make_classifier: Make, pixels: Tensor) -> None:
    model = attach(make_classifier(), DTEMConfig(r=5)).eval().to(torch.bfloat16)
    ours, theirs = without(model, pixels.bfloat16()), with_gradients(model, pixels.bfloat16())
    torch.testing.assert_close(ours, theirs, atol=5e-2, rtol=5e-2)
    model = model.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert without(model, pixels).isfinite().all()
