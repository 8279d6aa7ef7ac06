"""Tokens that are put back in place by hand, and the heads of dense models on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dtem_hf import DTEMConfig, MergeConfig, MergeTrace, ToMeConfig, attach
from dtem_hf.families import find_encoder
from tests.support import methods
from tests.support.family_case import FamilyCase, Inputs


Decode = Callable[[Any, list[Tensor]], Tensor]
METHODS: dict[str, MergeConfig] = {
    **{name: method.config for name, method in methods.METHODS.items()},
    "tome-by-layer": ToMeConfig(r=[0, 14, 0, 3]),
    "soft": DTEMConfig(r=[9, 0, 11, 3], relaxation="soft"),
}
SEGMENTATION = {
    "use_relative_position_bias": True,
    "out_indices": [1, 2, 3, 4],
    "use_mask_token": False,
    "auxiliary_channels": 8,
    "num_labels": 5,
    "pool_scales": [1, 2],
}


def put_back(x: Tensor, source: Tensor) -> Tensor:
    """Every original token is the token it ended in, one at a time."""
    return torch.stack([torch.stack([x[image, place] for place in source[image]]) for image in range(len(x))])


def layers_of(model: Any) -> Sequence[nn.Module]:
    """The layers of the part of a model that sees."""
    family, encoder = find_encoder(model)
    return family.layers(encoder)


def tensors(output: Any) -> list[Tensor]:
    """All tensors of an output, also those of outputs inside it."""
    found = []
    for value in output.values():
        found += [value] if isinstance(value, Tensor) else tensors(value) if isinstance(value, dict) else []
        found += list(value) if isinstance(value, tuple) and isinstance(value[0], Tensor) else []
    return found


@torch.no_grad()
def traced(model: Any, *args: Any, **kwargs: Any) -> tuple[Any, MergeTrace]:
    """A pass and its trace."""
    with model.trace_merging() as trace:
        output = model(*args, **kwargs)
    return output, trace


def run_recording(model: Any, *args: Any, **kwargs: Any) -> tuple[Any, list[Tensor]]:
    """A pass, and all tokens in place in front of the first layer and behind each, put back by hand."""
    found: list[Tensor] = []
    layers = layers_of(model)
    handles = [layers[0].register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))]
    for layer in layers:
        handles.append(
            layer.register_forward_hook(lambda *a: found.append(a[2][0] if isinstance(a[2], tuple) else a[2]))
        )
    output, trace = traced(model, *args, **kwargs)
    for handle in handles:
        handle.remove()
    return output, [found[0], *map(put_back, found[1:], trace.source_maps)]


@torch.no_grad()
def assert_the_reader_gets_all_tokens(
    case: FamilyCase, model_class: Any, merge: MergeConfig, inputs: Inputs, **vision: Any
) -> Any:
    """All outputs are those of the plain model whose layers return the tokens that were put back by hand."""
    plain, model = (case.make(model_class, **vision) for _ in range(2))
    output, tokens = run_recording(attach(model, merge), **inputs)
    unmerged = tensors(plain(**inputs))
    with model.unmerged():
        assert all(map(torch.equal, tensors(model(**inputs)), unmerged))
    for layer, given in zip(layers_of(plain), tokens[1:], strict=True):
        # In front of the hooks by which transformers records hidden states.
        layer.register_forward_hook(
            lambda *a, given=given: (given, *a[2][1:]) if isinstance(a[2], tuple) else given, prepend=True
        )
    expected = tensors(plain(**inputs))
    torch.testing.assert_close(tensors(output), expected, atol=1e-4, rtol=1e-4)
    assert any(not torch.allclose(ours, other, atol=1e-3) for ours, other in zip(expected, unmerged, strict=True))
    return output


def assert_segmentation_sees_the_grid(
    case: FamilyCase,
    model_class: Any,
    merge: MergeConfig,
    pixels: Tensor,
    decode: Decode,
) -> None:
    """The merged model's logits are those of `decode`, the stock heads on tokens that were put back by hand."""
    plain, model = (case.make(model_class, **SEGMENTATION) for _ in range(2))
    output, tokens = run_recording(attach(model, merge), pixels)
    with torch.no_grad():
        torch.testing.assert_close(output.logits, decode(plain, tokens), atol=1e-4, rtol=1e-4)
        unmerged = plain(pixels).logits
        assert output.logits.shape == unmerged.shape
        assert not torch.allclose(output.logits, unmerged, atol=1e-3)
        with model.unmerged():
            assert torch.equal(model(pixels).logits, unmerged)


def assert_segmentation_trains(case: FamilyCase, model_class: Any, pixels: Tensor) -> None:
    """What merging learns gets gradients through the heads, but for the last layer's, which they do not read."""
    model = attach(case.make(model_class, **SEGMENTATION).requires_grad_(False), DTEMConfig(r=9)).train()
    for parameter in model.merge_parameters():
        parameter.requires_grad_(True)
    labels = torch.randint(0, 5, (len(pixels), *pixels.shape[2:]))
    model(pixels, labels=labels).loss.backward()
    gradients = [parameter.grad for parameter in model.merge_parameters()]
    assert all(gradient is not None and gradient.isfinite().all() and gradient.any() for gradient in gradients[:-2])
