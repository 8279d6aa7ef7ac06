"""Export the part of a model that reads images as one graph of pixels, for any batch size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..errors import UnsupportedModelError, first_line
from ..models.vision import run_on_pixels


INPUT_NAME = "pixel_values"
# Two, because torch.export would fix a batch size of one.
_TRACED_BATCH = 2


class ImageGraph(nn.Module):
    """A module from pixel_values [B, C, H, W] to the model's tensors, in the order of `output_names`.

    Input and outputs are float32, which every runtime has; the model computes in its own dtype.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        output = run_on_pixels(self.model, pixel_values)
        return tuple(output[name].float() for name in _tensor_names(output))


def output_names(model: nn.Module, pixel_values: Tensor) -> list[str]:
    """The names of a model's output tensors for pixels [B, C, H, W]: `logits`, `last_hidden_state`, …"""
    with torch.inference_mode():
        return _tensor_names(run_on_pixels(model, pixel_values))


def export_graph(model: nn.Module, shape: tuple[int, ...]) -> ExportedProgram:
    """Export a model, or an ImageGraph, for images of [C, H, W] and any batch size.

    Raises UnsupportedModelError if that fails.
    """
    graph = model if isinstance(model, ImageGraph) else ImageGraph(model)
    pixels = torch.zeros(_TRACED_BATCH, *shape, device=next(model.parameters()).device)
    batch = {INPUT_NAME: {0: Dim("batch", min=1)}}
    try:
        with torch.no_grad():
            return torch.export.export(graph, (), {INPUT_NAME: pixels}, dynamic_shapes=batch)
    except Exception as error:  # torch documents no error class for this
        name = f"{type(graph.model).__name__} of {graph.model.config.model_type}"
        raise UnsupportedModelError(f"{name} cannot be exported as one graph: {first_line(error)}") from error


@contextmanager
def attention_as(model: nn.Module, implementation: str) -> Iterator[None]:
    """Use another attention implementation of a model inside the block."""
    model = model.model if isinstance(model, ImageGraph) else model
    before = model.config._attn_implementation  # type: ignore[union-attr]
    model.set_attn_implementation(implementation)  # type: ignore[operator]
    try:
        yield
    finally:
        model.set_attn_implementation(before)  # type: ignore[operator]


def _tensor_names(output: Any) -> list[str]:
    return [name for name, value in output.items() if isinstance(value, Tensor)]
