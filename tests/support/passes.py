"""Passes of merged models, as the tests of promises make and compare them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dtem_hf import MergeConfig, attach
from tests.support.family_case import Row


# Softly merged tokens are sorted by size. At the published temperatures most sizes are equal but for rounding, so
# their order, and all that follows, is left to chance; at these no two are.
MILD = {"score_temperature": 0.5, "assignment_temperature": 1.0}


def merged(row: Row, merge: MergeConfig, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
    """A merged model, in `.eval()`; what a method learns is moved away from where it starts."""
    model = attach(row.make(attention).to(dtype), merge)
    draw = torch.Generator().manual_seed(3)
    for parameter in model.merge_parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw).to(dtype)
    return model


def as_dtype(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """What a model sees in another precision."""
    seen = ("pixel_values", "input_values", "pixel_values_videos")
    return {name: value.to(dtype) if name in seen else value for name, value in inputs.items()}


def of_image(values: Tensor, index: int, count: int) -> Tensor:
    """What belongs to one of `count` images, in a batch [count, ...] or as many rows for each below each other."""
    (own,) = values.chunk(count)[index : index + 1]
    return own if len(values) > count else own[0]


def run(row: Row, model: Any, inputs: dict[str, Tensor] | None = None, **kwargs: Any) -> dict[str, Tensor]:
    """All tensors that a model makes of its inputs."""
    inputs = row.inputs(2) if inputs is None else inputs
    inputs = as_dtype(inputs, next(model.parameters()).dtype)
    torch.manual_seed(5)  # positions of DINOv3 are drawn in training
    made = model(**inputs, **kwargs)
    return {name: value for name, value in made.items() if isinstance(value, Tensor)}


def gradients(row: Row, model: Any) -> dict[str, Tensor]:
    """The gradient of a fixed function of the row's output for every parameter that it depends on."""
    model.zero_grad()
    run(row, model)[row.output].float().square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
