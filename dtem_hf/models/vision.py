"""Run the part of a model that reads images, on pixels alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import BadValue, UnsupportedModelError
from ..families import find_encoder


_SEEN = ("pixel_values", "input_values", "pixel_values_videos")


def image_part(model: nn.Module, encoder: nn.Module) -> nn.Module:
    """The largest part of a model that holds the encoder and needs only pixels; in CLIP, the vision tower."""
    for module in model.modules():
        sees = isinstance(module, PreTrainedModel) and module.main_input_name in _SEEN
        if sees and any(child is encoder for child in module.modules()):
            return module
    return encoder


def run_on_pixels(model: nn.Module, pixel_values: Tensor) -> Any:
    """Run the part of a model that reads images on pixels [B, C, H, W] of any size, device and dtype.

    Video models take clips [B, T, C, H, W], and others the inputs of their encoder.
    """
    family, encoder = find_encoder(model)
    part: Any = image_part(model, encoder)
    parameter, accepted = next(encoder.parameters()), signature(part.forward).parameters
    if "grid_thw" in accepted:
        raise UnsupportedModelError(f"{type(part).__name__} takes rows of patches and grid_thw, not images of pixels.")
    name = part.main_input_name if part.main_input_name in _SEEN else _SEEN[0]
    kwargs: dict[str, Any] = {name: pixel_values.to(parameter.device, parameter.dtype)}
    # Families whose position embeddings fit any size have no such argument.
    if "interpolate_pos_encoding" in accepted and tuple(pixel_values.shape[1:]) != family.input_shape(encoder):
        kwargs["interpolate_pos_encoding"] = True
    return part(**kwargs)


def image_shape(model: nn.Module, image_size: int | None = None) -> tuple[int, ...]:
    """Channels, height and width of a model's images; of clips, the number of frames comes first.

    `image_size` is in pixels; None: the model's own size.
    """
    family, encoder = find_encoder(model)
    return family.input_shape(encoder, image_size)


def pixel_batches(images: Any, batch_size: int) -> list[Tensor]:
    """Batches of pixel values, from a tensor [n, C, H, W] or from batches (tensors, or dicts with `pixel_values`)."""
    batches: list[Any] = []
    if isinstance(images, Tensor):
        batches = list(images.split(batch_size)) if images.dim() == 4 else []
    elif isinstance(images, Iterable) and not isinstance(images, str | Mapping):
        batches = [batch.get("pixel_values") if isinstance(batch, Mapping) else batch for batch in images]
    if not batches or any(not isinstance(x, Tensor) or x.dim() != 4 or len(x) == 0 for x in batches):
        shown = images if isinstance(images, str) else type(images).__name__
        raise BadValue("images", shown, "pixel values [n, C, H, W], or batches of them; at least one")
    return batches


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode inside the block; afterwards restore the mode of every module."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
