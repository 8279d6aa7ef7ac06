"""Open images in the same way in every program (upright, 8-bit RGB, bounded size), and load image processors."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # at the top, 5.17 asks for torchvision

from .errors import BadValue, UnreadableImage, need


# The field in which WebDataset stores the name of an example.
SHARD_KEY = "__key__"
# 134 million: more than any camera has, and half a gigabyte in RGB with alpha.
MOST_PIXELS = 1 << 27
# A digest reads the content of at least so many files.
_DIGESTED = 2000
# Modes that do not define the value of white, with the values it may have. The first that is at least the image's
# maximum is taken.
_WHITE = {"I": (255, 65535, 2**31 - 1), "F": (1.0, 255.0, 65535.0)}


def load_processor(model: str) -> Any:
    """The image processor of a model, with the PIL backend, which needs no torchvision."""
    return AutoImageProcessor.from_pretrained(model, backend="pil")


def open_image(source: Any, name: str) -> Image.Image:
    """Open an image and convert it with `as_rgb`. Raises UnreadableImage, with `name` in its message.

    `source` is a path, a Pillow image, or an entry of an undecoded image column: {"bytes", "path"}.
    """
    try:
        with _opened(source) as image:
            if image.width * image.height > MOST_PIXELS:
                raise BadValue("size", image.size, f"at most {MOST_PIXELS:,} pixels")
            return as_rgb(image)
    except Exception as error:  # broken files make decoders raise all kinds of errors
        raise UnreadableImage(f"image {name} cannot be read ({type(error).__name__}: {error})") from error


def as_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to 8-bit RGB: turn it upright by EXIF, scale 16-bit and float values, put it on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode in _WHITE or image.mode.startswith("I;16"):
        image = Image.fromarray(_eight_bit(np.asarray(image), _WHITE.get(image.mode, (65535,))))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def files_digest(files: Iterable[tuple[str, Any]], count: int) -> str:
    """A short hash of `count` files, given as pairs of a label and a path or content.

    It covers the labels and sizes of all files, and the content of all, or of at least 2,000 spread evenly.
    """
    found, step = hashlib.sha256(), max(1, count // _DIGESTED)
    for i, (text, source) in enumerate(files):
        inside = isinstance(source, bytes)
        local = not inside and source is not None and os.path.isfile(source)
        size = len(source) if inside else os.path.getsize(source) if local else 0
        found.update(f"{text}:{size}\n".encode())
        if i % step == 0:
            found.update(source if inside else Path(source).read_bytes() if local else b"")
    return found.hexdigest()[:16]


def row_name(row: dict[str, Any], index: int) -> str:
    """The name of an image: its file, its key in a shard, or its number."""
    image = row["image"] if isinstance(row.get("image"), dict) else {}
    return row.get(SHARD_KEY) or image.get("path") or str(index)


def _opened(source: Any) -> Image.Image:
    if isinstance(source, Image.Image):
        return source.copy()
    if not isinstance(source, dict):
        return Image.open(source)
    if source.get("bytes") is not None:
        return Image.open(BytesIO(source["bytes"]))
    if os.path.exists(source["path"]):
        return Image.open(Path(source["path"]))
    need("train", "an image of a data set on the Hub", "datasets")
    import datasets

    return datasets.Image().decode_example(source)


def _eight_bit(values: Any, whites: tuple[float, ...]) -> Any:
    low, high = float(values.min()), float(values.max())
    white = next((white for white in whites if high <= white), None)
    if white is None or not low >= 0:
        raise BadValue("pixels", (low, high), f"values from 0 to {' or '.join(f'{white:.10g}' for white in whites)}")
    return np.rint(values.astype(np.float64) * (255 / white)).astype(np.uint8)
