"""The ViTs that every promise is tested on, with and without a head, and what the tests of promises share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification, ViTModel

import dtem_hf
from dtem_hf import DTEMConfig, MergeConfig, ToMeConfig, attach


@dataclass(frozen=True)
class Row:
    """One model: `make` takes changes to its config and gives it four layers."""

    name: str
    make: Callable[..., Any]
    auto: Any
    outputs: tuple[str, ...]
    image_size: int = 32
    other_image_sizes: tuple[int, ...] = ()


def make_vit(model_class: type, **changes: Any) -> Any:
    torch.manual_seed(1)
    values = {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "image_size": 32,
        "patch_size": 4,
        "num_labels": 10,
        "initializer_range": 0.2,
    }
    return model_class(ViTConfig(**{**values, **changes})).eval()


ROWS = [
    Row(
        "vit",
        lambda **changes: make_vit(ViTModel, **changes),
        dtem_hf.AutoModel,
        ("last_hidden_state", "pooler_output"),
        other_image_sizes=(48, 16),
    ),
    Row(
        "vit-classifier",
        lambda **changes: make_vit(ViTForImageClassification, **changes),
        dtem_hf.AutoModelForImageClassification,
        ("logits",),
        other_image_sizes=(48, 16),
    ),
]


@dataclass(frozen=True)
class Method:
    """One reduction method; `config` takes its fields."""

    name: str
    config: Callable[..., MergeConfig]
    learns: bool


METHODS = [Method("tome", ToMeConfig, learns=False), Method("dtem", DTEMConfig, learns=True)]
REDUCTIONS = [9, [11, 0, 14, 3]]
# Softly merged tokens are sorted by size. At the published temperatures most sizes are equal but for rounding, so
# their order, and all that follows, is left to chance; at these no two are.
MILD = {"score_temperature": 0.5, "assignment_temperature": 1.0}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every test that asks for a row, or a method, with all of them; whoever imports this has it."""
    for name, values in (("row", ROWS), ("method", METHODS)):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values, ids=lambda value: value.name)


def images(row: Row, count: int = 3, size: int | None = None) -> Tensor:
    size = size or row.image_size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(2))


def merged(row: Row, method: Method, r: Any = 9, model: Any = None, **fields: Any) -> Any:
    """A merged model, in `.eval()`; what a method learns is moved away from where it starts."""
    model = attach(row.make() if model is None else model, method.config(r=r, **fields))
    generator = torch.Generator().manual_seed(3)
    for parameter in model.merge_parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


def run(row: Row, model: Any, pixel_values: Tensor, **kwargs: Any) -> dict[str, Tensor]:
    """The compared outputs of a forward pass without gradients."""
    with torch.no_grad():
        output = model(pixel_values=pixel_values, **kwargs)
    return {name: output[name] for name in row.outputs}


def same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


def gradients(row: Row, model: Any, pixel_values: Tensor) -> dict[str, Tensor]:
    """The gradient of a fixed function of all outputs for every parameter that it depends on."""
    model.zero_grad()
    output = model(pixel_values=pixel_values)
    sum((output[name].float() * weigh(output[name])).sum() for name in row.outputs).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def weigh(x: Tensor) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
