"""FlashAttention and FlexAttention of merged models: the same scores as with the sizes as a mask.

Flash kernels need a GPU. Where there is none, a plain softmax without any mask takes the place of the kernel that
transformers calls, and all of transformers around it runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel, Siglip2VisionConfig, Siglip2VisionModel
from transformers.integrations import flash_attention
from transformers.integrations.flash_attention import flash_attention_forward

from dtem_hf import DTEMConfig, ToMeConfig, attach, detach
from dtem_hf.errors import UnsupportedModelError
from dtem_hf.families.unmasked_attention import enable_size_bias
from dtem_hf.scope import Scope, open_scope
from dtem_hf.token_state import TokenState


FLASH = ("flash_attention_2", "flash_attention_3", "someone/flash-kernel")


def plain_kernel(query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Tensor:
    """Softmax of the scores alone: [B, n, H, d] three times -> [B, n, H, d]; a 2-D mask leaves padding out."""
    assert not kwargs["is_causal"] and not kwargs["dropout"]
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * kwargs["softmax_scale"]
    if attention_mask is not None:
        assert attention_mask.dim() == 2, "FlashAttention reads a mask as padding"
        scores = scores.masked_fill(attention_mask[:, None, None, :] == 0, -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), value)


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A flash kernel for the CPU, one of the Hub that is loaded as such, and the registry as it was, afterwards."""
    monkeypatch.setattr(flash_attention, "_flash_attention_forward", plain_kernel)
    before = dict(AttentionInterface._global_mapping)
    AttentionInterface.register("someone/flash-kernel", flash_attention_forward)
    # FlexAttention as its definition in tensor operations, not compiled.
    with torch.compiler.set_stance("force_eager"):
        yield
    AttentionInterface._global_mapping.clear()
    AttentionInterface._global_mapping.update(before)


def attending_by(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """The model with an implementation that transformers itself would refuse on this machine."""
    model.config._attn_implementation = name
    return model


def merged(model: PreTrainedModel, config: Any) -> PreTrainedModel:
    """Attached, and with another exponent for every head where they are learned."""
    model = attach(model, config)
    for name, parameter in model.named_parameters():
        if ".exponents." in name:
            with torch.no_grad():
                parameter.copy_(torch.linspace(0.5, 1.5, parameter.numel()))
    return model


@torch.no_grad()
def logits(model: Any, pixels: Tensor) -> Tensor:
    return model(pixels).logits


@pytest.mark.parametrize("name", [*FLASH, "flex_attention"])
@pytest.mark.parametrize("config", [ToMeConfig(r=9), DTEMConfig(r=9, learn_exponents=True)], ids=["tome", "exponents"])
def test_scores_are_those_with_a_mask(make_classifier: Any, pixels: Tensor, name: str, config: Any) -> None:
    expected = logits(merged(make_classifier(), config), pixels)
    for model in (
        merged(attending_by(make_classifier(), name), config),
        attending_by(merged(make_classifier(), config), name),  # set afterwards
    ):
        torch.testing.assert_close(logits(model, pixels), expected, atol=2e-5, rtol=1e-5)
    unbiased = attach(make_classifier(), ToMeConfig(r=9, proportional_attention=False))
    assert (logits(unbiased, pixels) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("name", [*FLASH, "flex_attention"])
def test_without_a_merge_transformers_function_runs(make_classifier: Any, pixels: Tensor, name: str) -> None:
    plain = logits(attending_by(make_classifier(), name), pixels)
    model = attending_by(attach(make_classifier(), ToMeConfig(r=9)), name)
    assert not torch.equal(logits(model, pixels), plain)
    model.set_reduction(r=0)
    assert torch.equal(logits(model, pixels), plain)
    model = detach(model)
    assert model.config._attn_implementation == name and torch.equal(logits(model, pixels), plain)


def test_gradients_are_those_with_a_mask(make_classifier: Any, pixels: Tensor) -> None:
    """In training, where sizes carry a gradient."""
    gradients = []
    for model in (attach(make_classifier(), DTEMConfig(r=9)), attach(make_classifier(), DTEMConfig(r=9))):
        if gradients:
            attending_by(model, "flash_attention_2")
        model.train()(pixels).logits.square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.merge_parameters()]))
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5 * float(gradients[0].abs().max()), rtol=1e-4)


def test_padded_tokens_stay_left_out() -> None:
    """Before a merge as a mask of padding, which the model makes itself; behind it as a bias far below all others."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    model = Siglip2VisionModel(Siglip2VisionConfig(**shape, patch_size=4, num_patches=64)).eval()
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, 24:] = 0
    inputs = {
        "pixel_values": torch.randn(2, 40, 48),
        "pixel_attention_mask": mask,
        "spatial_shapes": torch.tensor([[5, 8], [4, 6]]),
    }
    attach(model, ToMeConfig(r=4))
    with torch.no_grad():
        expected = model(**inputs).pooler_output
        found = attending_by(model, "flash_attention_2")(**inputs).pooler_output
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_bias_for_every_query_is_refused_in_a_merged_model_alone() -> None:
    """Elsewhere it is a mask that the model gives FlexAttention itself, which adds it."""
    enable_size_bias("flex_attention")
    function = AttentionInterface()["flex_attention"]
    module = torch.nn.Linear(1, 1).eval()
    module.config = type("Config", (), {"_attn_implementation": "flex_attention"})()
    query, key, value = (torch.randn(1, 2, 5, 8) for _ in range(3))
    bias = torch.randn(1, 1, 5, 5)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    found = function(module, query, key, value, bias, scaling=8**-0.5)[0]
    torch.testing.assert_close(found, expected.transpose(1, 2), atol=1e-6, rtol=1e-5)
    with (
        open_scope(Scope(state=TokenState(lambda count: [0], 1))),
        pytest.raises(
            UnsupportedModelError, match=r"attn_implementation='flex_attention'.*every pair of query and key.*sdpa"
        ),
    ):
        function(module, query, key, value, bias)


@pytest.mark.parametrize("name", ["paged|sdpa", "own_attention"])
def test_what_reads_no_bias_is_refused(make_classifier: Any, pixels: Tensor, name: str) -> None:
    AttentionInterface.register("own_attention", lambda *args, **kwargs: None)
    model = attach(make_classifier(), ToMeConfig(r=4))
    expected = logits(model, pixels)
    attending_by(model, name)
    with pytest.raises(UnsupportedModelError, match="flash_attention_2, flash_attention_3, flex_attention"):
        model(pixels)
    attending_by(model, "sdpa")
    assert torch.equal(logits(model, pixels), expected)
    with pytest.raises(UnsupportedModelError, match="attn_implementation"):
        attach(attending_by(make_classifier(), name), ToMeConfig(r=4))
