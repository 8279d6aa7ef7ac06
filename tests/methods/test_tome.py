"""ToMe on a real DeiT-tiny against the numbers of its authors' program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import ViTForImageClassification

from dtem_hf import ToMeConfig, attach


def test_the_plain_model_is_the_one_the_numbers_come_from(
    deit_tiny: Callable[[], ViTForImageClassification], oracle: dict[str, Tensor]
) -> None:
    with torch.no_grad():
        logits = deit_tiny()(oracle["pixel_values"]).logits
    torch.testing.assert_close(logits, oracle["logits_plain"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["r8", "r13", "r16", "list"])
def test_logits_equal_the_authors(
    deit_tiny: Callable[[], ViTForImageClassification], oracle: dict[str, Tensor], name: str, attn_implementation: str
) -> None:
    r: Any = oracle["r_list"].tolist() if name == "list" else int(name[1:])
    model = deit_tiny()
    model.set_attn_implementation(attn_implementation)
    attach(model, ToMeConfig(r=r))
    with torch.no_grad():
        logits = model(oracle["pixel_values"]).logits
    torch.testing.assert_close(logits, oracle[f"logits_tome_{name}"], atol=1e-4, rtol=0)


def test_it_is_hard_in_training_as_well(make_classifier: Callable[..., Any], pixels: Tensor) -> None:
    """ToMe has nothing to relax: `.train()` changes nothing where there is no dropout."""
    model = attach(make_classifier(), ToMeConfig(r=9))
    with torch.no_grad():
        assert torch.equal(model.train()(pixels).logits, model.eval()(pixels).logits)


def test_keys_are_read_from_whatever_stands_in_the_place_of_the_projection(
    make_classifier: Callable[..., Any], pixels: Tensor
) -> None:
    """A wrapper around the key projection (as LoRA's) that changes the keys changes the matching with them."""

    class Wrapped(torch.nn.Module):
        def __init__(self, base: torch.nn.Linear) -> None:
            super().__init__()
            self.base = base
            self.register_buffer("delta", torch.randn_like(base.weight))

        @property
        def weight(self) -> Tensor:
            return self.base.weight

        @property
        def bias(self) -> Tensor:
            return self.base.bias

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + x @ self.delta.T

    wrapped, merged_weights = make_classifier(), make_classifier()
    for ours, theirs in zip(wrapped.vit.layers, merged_weights.vit.layers, strict=True):
        ours.attention.k_proj = Wrapped(ours.attention.k_proj)
        theirs.attention.k_proj.weight.data += ours.attention.k_proj.delta
    with torch.no_grad():
        ours, theirs = (attach(model, ToMeConfig(r=9))(pixels).logits for model in (wrapped, merged_weights))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
