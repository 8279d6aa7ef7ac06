"""The part of a model that sees images as one graph of pixels, for any batch."""

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
# Two: a graph that is traced with one image takes only one.
_TRACED_BATCH = 2


class ImageGraph(nn.Module):
    """pixel_values [B, C, H, W] float32 -> the model's tensors, in the order of `output_names`, as float32.

    The model computes in its own dtype; float32 at both ends is what the arrays of every runtime can hold.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        output = run_on_pixels(self.model, pixel_values)
        return tuple(output[name].float() for name in _tensor_names(output))


def output_names(model: nn.Module, pixel_values: Tensor) -> list[str]:
    """The names of the tensors that a model returns for pixels [B, C, H, W]: `logits`, `last_hidden_state`, …"""
    with torch.inference_mode():
        return _tensor_names(run_on_pixels(model, pixel_values))


def export_graph(model: nn.Module, shape: tuple[int, ...]) -> ExportedProgram:
    """Trace a model, or an ImageGraph as it is, for images of [C, H, W] and a batch of any size.

    Raises UnsupportedModelError where that fails.
    """
    graph = model if isinstance(model, ImageGraph) else ImageGraph(model)
    pixels = torch.zeros(_TRACED_BATCH, *shape, device=next(model.parameters()).device)
    batch = {INPUT_NAME: {0: Dim("batch", min=1)}}
    try:
        with torch.no_grad():
            return torch.export.export(graph, (), {INPUT_NAME: pixels}, dynamic_shapes=batch)
    except Exception as error:  # torch documents no error class for it
        name = f"{type(graph.model).__name__} of {graph.model.config.model_type}"
        raise UnsupportedModelError(f"{name} cannot be exported as one graph: {first_line(error)}") from error


@contextmanager
def attention_as(model: nn.Module, implementation: str) -> Iterator[None]:
    """Inside the block a model attends by another implementation."""
    model = model.model if isinstance(model, ImageGraph) else model
    before = model.config._attn_implementation  # type: ignore[union-attr]
    model.set_attn_implementation(implementation)  # type: ignore[operator]
    try:
        yield
    finally:
        model.set_attn_implementation(before)  # type: ignore[operator]


def _tensor_names(output: Any) -> list[str]:
    return [name for name, value in output.items() if isinstance(value, Tensor)]
