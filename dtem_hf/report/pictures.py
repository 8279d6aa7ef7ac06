"""Pictures of merged tokens: every final token over its patches, in their mean colour (docs/method.md section 8).

The suffix of a picture's path is its format. Files are written atomically.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray
from PIL.Image import Image
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import BadValue
from ..families import find_encoder
from ..models.attach import MergeMixin
from ..models.install import merged_layers
from ..models.vision import evaluating, run_on_pixels
from ..opening import as_rgb
from .plots import check_figure_format, save_figure


# Above this luminance a border is black, because a white one would not be visible.
_BRIGHT = 0.75
_LUMINANCE = (0.299, 0.587, 0.114)
_CELL_INCHES = 2.4
_CELL_PIXELS = 480
_MODES = {1: "L", 3: "RGB"}
# A picture and its caption.
Panel = tuple[NDArray[np.float64], str]


def token_groups(source_map: Any, num_prefix_tokens: int, grid: tuple[int, int]) -> NDArray[np.int64]:
    """The final token of every patch: source map [N], prefix tokens first -> [rows, columns] int64.

    Raises ValueError if the source map does not cover prefix and grid.
    """
    source = np.asarray(source_map)
    rows, columns = grid
    if source.shape != (num_prefix_tokens + rows * columns,):
        raise BadValue(
            "source_map",
            source.shape,
            f"one entry for each of {num_prefix_tokens} prefix tokens and {rows}×{columns} patches",
        )
    return source[num_prefix_tokens:].reshape(rows, columns).astype(np.int64)


def merged_token_image(
    pixels: Any, source_map: Any, num_prefix_tokens: int, patch_size: int | Sequence[int]
) -> NDArray[np.float64]:
    """Draw every final token over its patches, in their mean colour: pixels [H, W, 3] in 0..1 -> [H, W, 3] in 0..1.

    If two neighbouring patches are in different tokens, the first row or column of pixels of the lower or right patch
    is a border: white, or black on a bright token. Pixels at the right and lower edge that fill no patch do not
    change. Raises ValueError if the source map [N] does not cover the patches.
    """
    pixels = np.asarray(pixels, dtype=np.float64)
    height, width = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    rows, columns = pixels.shape[0] // height, pixels.shape[1] // width
    groups = token_groups(source_map, num_prefix_tokens, (rows, columns))
    covered = pixels[: rows * height, : columns * width]

    # [rows · h, columns · w, 3] -> [rows, h, columns, w, 3] -> [rows, columns, 3]
    patches = covered.reshape(rows, height, columns, width, 3).mean(axis=(1, 3))
    _, token, count = np.unique(groups, return_inverse=True, return_counts=True)
    token = token.reshape(rows, columns)
    colours = np.zeros((len(count), 3))
    np.add.at(colours, token, patches)
    colours /= count[:, None]

    token = token.repeat(height, axis=0).repeat(width, axis=1)  # [rows, columns] -> [rows · h, columns · w]
    drawn = colours[token]
    border = np.zeros(token.shape, dtype=bool)
    border[1:] |= token[1:] != token[:-1]
    border[:, 1:] |= token[:, 1:] != token[:, :-1]
    drawn[border] = (drawn[border] @ _LUMINANCE <= _BRIGHT)[:, None]
    picture = pixels.copy()
    picture[: rows * height, : columns * width] = drawn
    return picture


def displayed_pixels(pixel_values: Tensor, processor: Any) -> NDArray[np.float64]:
    """Undo a processor's normalisation: pixel values [C, H, W] with C 1 or 3 -> [H, W, 3] in 0..1."""
    pixels = pixel_values.detach().float().cpu().permute(1, 2, 0).numpy().astype(np.float64)  # [C, H, W] -> [H, W, C]
    if getattr(processor, "do_normalize", False):
        pixels = pixels * np.asarray(processor.image_std) + np.asarray(processor.image_mean)
    pixels /= 255 * processor.rescale_factor if getattr(processor, "do_rescale", False) else 255
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3)).clip(0, 1)


def draw_merged_tokens(
    images: Sequence[Image],
    models: Mapping[str, PreTrainedModel],
    processor: Any,
    path: str | os.PathLike[str],
) -> None:
    """Write one figure with a row per image: the model's input, then a column per merged model.

    The keys of `models` are their titles. The models run on one image at a time, in eval mode; their mode is restored.
    Raises ValueError for a model that is not merged, and without images or models.
    """
    _check(images, models, path)
    rows = []
    for image in images:
        drawn = [panels_of(image, model, processor) for model in models.values()]
        rows.append([drawn[0][0], *(panels[0] for _, panels in drawn)])
    save_figure(_grid(rows, list(models)), path)


def draw_merged_layers(
    image: Image, models: Mapping[str, PreTrainedModel], processor: Any, path: str | os.PathLike[str]
) -> None:
    """Write one figure of the merges from layer to layer: a row per merged model, a column per layer.

    It shows four layers, spread evenly, with the last one. All else is as in `draw_merged_tokens`.
    """
    _check([image], models, path)
    depth = min(len(merged_layers(model)) for model in models.values())
    layers = sorted({-(-depth * i // 4) for i in range(1, 5)})
    rows = []
    for model in models.values():
        seen, panels = panels_of(image, model, processor, [layer - 1 for layer in layers])
        rows.append([seen, *panels])
    save_figure(_grid(rows, [f"layer {layer}" for layer in layers], list(models)), path)


def draw_maps(images: Sequence[NDArray[Any]], maps: Mapping[str, NDArray[Any]], path: str | os.PathLike[str]) -> None:
    """Write one figure with a row per image [H, W, 3]: the image, then its map from every entry [n, h, w] of `maps`.

    All values are from 0 to 1.
    """
    check_figure_format(path)
    rows = [[(image, ""), *((own[i], "") for own in maps.values())] for i, image in enumerate(images)]
    save_figure(_grid(rows, list(maps)), path)


def _check(images: Sequence[Image], models: Mapping[str, PreTrainedModel], path: str | os.PathLike[str]) -> None:
    check_figure_format(path)
    if not images or not models:
        raise BadValue("images, models", (len(images), len(models)), "at least one of each")
    for label, model in models.items():
        if not isinstance(model, MergeMixin):
            raise BadValue(
                f"models[{label!r}]", type(model).__name__, "a merged model: from_pretrained(merge=…) or attach"
            )


def _grid(rows: Sequence[Sequence[Panel]], columns: Sequence[str], titles: Sequence[str] = ()) -> Figure:
    """A figure of panels: names of columns on top, after "input", and `titles` of rows on the left."""
    # A row has the height of its image, plus room for the number of tokens.
    heights = [row[0][0].shape[0] / row[0][0].shape[1] + 0.1 for row in rows]
    figure = Figure(
        figsize=(_CELL_INCHES * (1 + len(columns)) + 0.3, _CELL_INCHES * sum(heights) + 0.35),
        dpi=150,
        layout=ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03, wspace=0.01, hspace=0.01),
    )
    axes = figure.subplots(len(rows), 1 + len(columns), squeeze=False, gridspec_kw={"height_ratios": heights})
    for row, row_axes in zip(rows, axes, strict=True):
        for (picture, caption), axis in zip(row, row_axes, strict=True):
            axis.imshow(picture, interpolation="antialiased", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set(linewidth=0.5, color="0.8")
            axis.set_xlabel(caption, fontsize=8, labelpad=3, color="0.35")
    for label, axis in zip(["input", *columns], axes[0], strict=True):
        axis.set_title(label, fontsize=10, parse_math=False)
    for title, axis in zip(titles, axes[:, 0], strict=False):
        axis.set_ylabel(title, fontsize=9, parse_math=False)
    return figure


def panels_of(image: Image, model: Any, processor: Any, layers: Sequence[int] = (-1,)) -> tuple[Panel, list[Panel]]:
    """The pixels of an image as a model gets them, and a picture of its tokens behind each of `layers`."""
    processor = getattr(processor, "image_processor", processor)  # a processor for images and text holds one
    family, encoder = find_encoder(model)
    config: Any = encoder.config
    pixel_values = processor(images=_in_mode(image, config.num_channels), return_tensors="pt").pixel_values
    with evaluating(model), torch.no_grad(), model.trace_merging() as trace:
        run_on_pixels(model, pixel_values)
    source_maps = [source_map[0].cpu().numpy() for source_map in trace.source_maps]  # one per layer
    pixels, patch = displayed_pixels(pixel_values[0], processor), family.patch_sides(config)
    prefix = family.geometry(encoder).num_prefix_tokens
    # Enlarge every pixel, so that a border of one pixel is thin even if a patch is two pixels wide.
    scale = math.ceil(_CELL_PIXELS / pixels.shape[1])
    enlarged = pixels.repeat(scale, axis=0).repeat(scale, axis=1)
    panels = []
    for layer in layers:
        picture = merged_token_image(enlarged, source_maps[layer], prefix, [extent * scale for extent in patch])
        tokens = len(np.unique(source_maps[layer][prefix:]))
        panels.append((picture, f"{len(source_maps[layer]) - prefix} patches → {tokens} tokens"))
    return (pixels, ""), panels


def _in_mode(image: Image, num_channels: int) -> Image:
    if num_channels not in _MODES:
        raise BadValue("num_channels", num_channels, f"one of {sorted(_MODES)}")
    return as_rgb(image).convert(_MODES[num_channels])
