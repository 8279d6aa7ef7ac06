"""The last layer computes the prefix tokens alone where nobody reads the others: the same logits, and only then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from family_table import FAMILIES, NESTED, inputs_of, make
from torch import Tensor
from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher, ViTForImageClassification
from transformers.models.vit.modeling_vit import ViTAttention

from dtem_hf import DTEMConfig, EViTConfig, ToMeConfig, attach, detach
from dtem_hf.backbones import Backbone, find_backbone
from dtem_hf.ops import products


Make = Callable[..., ViTForImageClassification]
CONFIGS = {"tome": ToMeConfig(r=9), "dtem": DTEMConfig(r=9), "evit": EViTConfig(0.5)}
methods = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def rows_of_last_mlp(model: Any, pixels: Tensor, **kwargs: Any) -> tuple[int, Tensor]:
    """How many tokens the MLP of the last layer got, seen from inside its activation, and the logits."""
    rows: list[int] = []
    activation = model.base_model.layers[-1].mlp.activation_fn
    stock = activation.forward
    activation.forward = lambda x: (rows.append(x.shape[1]), stock(x))[1]
    try:
        with torch.no_grad():
            logits = model(pixels, **kwargs).logits
        return rows[-1], logits
    finally:
        del activation.forward


@methods
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_logits_are_those_of_all_rows(
    make_classifier: Make, pixels: Tensor, config: Any, attn_implementation: str
) -> None:
    model = attach(make_classifier(attn_implementation=attn_implementation), config)
    rows, narrow = rows_of_last_mlp(model, pixels)
    all_rows, full = rows_of_last_mlp(model, pixels, output_hidden_states=True)
    assert (rows, all_rows) == (1, model.merge_plan().tokens[-1])
    torch.testing.assert_close(narrow, full, atol=1e-5, rtol=1e-5)
    assert rows_of_last_mlp(model, pixels)[0] == 1  # the recorders that transformers has left there see nothing


def test_two_prefix_tokens_are_two_rows(pixels: Tensor) -> None:
    values = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    config = DeiTConfig(**values, image_size=32, patch_size=4, num_labels=10, initializer_range=0.2)
    model = attach(DeiTForImageClassificationWithTeacher(config).eval(), ToMeConfig(r=9))
    rows, narrow = rows_of_last_mlp(model, pixels)
    all_rows, full = rows_of_last_mlp(model, pixels, output_hidden_states=True)
    assert (rows, all_rows) == (2, model.merge_plan().tokens[-1])
    torch.testing.assert_close(narrow, full, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("place", ["vit", "vit.layernorm", "vit.layers.3", "vit.layers.3.mlp.fc1"])
def test_a_hook_sees_all_rows(make_classifier: Make, pixels: Tensor, place: str) -> None:
    model = attach(make_classifier(), ToMeConfig(r=9))
    handle = model.get_submodule(place).register_forward_hook(lambda *_: None)
    assert rows_of_last_mlp(model, pixels)[0] == model.merge_plan().tokens[-1]
    handle.remove()
    assert rows_of_last_mlp(model, pixels)[0] == 1


def test_a_trace_an_unmerged_output_and_nothing_merged_take_all_rows(make_classifier: Make, pixels: Tensor) -> None:
    model = attach(make_classifier(), ToMeConfig(r=9))
    with model.trace_merging():
        assert rows_of_last_mlp(model, pixels)[0] == model.merge_plan().tokens[-1]
    assert rows_of_last_mlp(attach(make_classifier(), ToMeConfig(r=9), unmerge=True), pixels)[0] == 65 - 4 * 9
    for r in (0, [0, 0, 0, 9]):
        model = attach(make_classifier(), ToMeConfig(r=r))
        assert rows_of_last_mlp(model, pixels)[0] == model.merge_plan().tokens[-1]
        assert model.merge_plan().multiply_adds == model.merge_plan().full_multiply_adds


def test_the_encoder_called_alone_and_a_head_of_ones_own_get_all_tokens(make_classifier: Make, pixels: Tensor) -> None:
    class Mean(ViTForImageClassification):
        def forward(self, pixel_values: Tensor) -> Tensor:
            return self.vit(pixel_values).last_hidden_state.mean(dim=1)

    model = attach(make_classifier(), ToMeConfig(r=9))
    with torch.no_grad():
        assert model.vit(pixels).last_hidden_state.shape[1] == 29
        own = attach(Mean(model.config).eval(), ToMeConfig(r=9))
        torch.testing.assert_close(own(pixels), own.vit(pixels).last_hidden_state.mean(dim=1))


def test_gradients_are_those_of_all_rows(make_classifier: Make, pixels: Tensor) -> None:
    model = attach(make_classifier(), ToMeConfig(r=9))
    x = pixels.clone().requires_grad_()
    narrow, full = (
        torch.autograd.grad(model(x, output_hidden_states=wanted).logits.square().sum(), x)[0]
        for wanted in (False, True)
    )
    torch.testing.assert_close(narrow, full, atol=1e-4, rtol=1e-4)


def test_attention_of_ones_own_is_left_alone_and_detach_closes_it(make_classifier: Make, pixels: Tensor) -> None:
    class Doubled(ViTAttention):
        def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
            return 2 * super().forward(hidden_states, attention_mask, **kwargs)[0], None

    model = make_classifier()
    model.vit.layers[1].attention.__class__ = Doubled
    merged = attach(model, ToMeConfig(r=9))
    assert type(merged.vit.layers[1].attention) is Doubled
    assert type(merged.vit.layers[0].attention) is not ViTAttention
    assert type(detach(merged).vit.layers[0].attention) is ViTAttention


# Their queries, keys and values come from one product, or are turned in between.
CLOSED = ("blip", "data2vec", "dinov3", *NESTED)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_keys_are_computed_once(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """ToMe compares by the keys that attention has computed: neither the projection nor its weight is used again."""
    for name in ("_SMALLEST_WEIGHT", "_LARGE_WEIGHT", "_FEWEST_PRODUCTS", "_FEWEST_ROWS"):
        monkeypatch.setattr(products, name, 0)
    model = make(family)
    attach(model, ToMeConfig(r=9))
    backbone, encoder = find_backbone(model)
    layers = backbone.layers(encoder)
    assert all(backbone.hands_out_keys(layer) == (not family.startswith(CLOSED)) for layer in layers)
    with CountedMeanKeys() as counted:
        model(**inputs_of(family, 1))  # by products where this machine has them
        assert counted.times == (len(layers) if family.startswith(CLOSED) else 0)
        calls: list[Any] = []
        for layer in layers:
            backbone.key_linear(layer)[0].register_forward_hook(lambda module, *_: calls.append(module))
        model(**inputs_of(family, 1))
    assert len(calls) == len(layers)


class CountedMeanKeys:
    """Counts how often any family computes mean keys of its own."""

    times = 0

    def __enter__(self) -> CountedMeanKeys:
        self._stock = Backbone.mean_keys

        def counted(backbone: Backbone, *args: Any) -> Tensor:
            self.times += 1
            return self._stock(backbone, *args)

        Backbone.mean_keys = counted  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        Backbone.mean_keys = self._stock  # type: ignore[method-assign]
