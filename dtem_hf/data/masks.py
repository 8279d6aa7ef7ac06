"""Images with a class for every pixel, from a folder or from a data set on the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import load_dataset
from numpy.typing import NDArray
from PIL import Image

from ..errors import BadValue
from ..opening import open_image


IGNORED = 255
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass
class SegmentationImages:
    """Indexed pairs of image and mask: files of a folder, or rows of a dataset."""

    pairs: Any
    image_column: str = "image"
    mask_column: str = "annotation"

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Image.Image, NDArray[np.uint8]]:
        """An image in RGB and its mask [H, W]. Raises ValueError for a mask of another size or with colours."""
        pair = self.pairs[index]
        if isinstance(pair, tuple):
            image, mask = open_image(pair[0], pair[0].name), Image.open(pair[1])
        else:
            image, mask = open_image(pair[self.image_column], str(index)), pair[self.mask_column]
        classes = np.asarray(mask)
        if classes.ndim != 2 or classes.shape != (image.height, image.width):
            fits = f"one class per pixel, with the height and width of its image, {image.size[::-1]}"
            raise BadValue(f"mask {index}", classes.shape, fits)
        if classes.min() < 0 or classes.max() > IGNORED:
            raise BadValue(f"mask {index}", int(classes.max()), f"classes from 0 to {IGNORED} ({IGNORED}: ignored)")
        return image, classes.astype(np.uint8)


def load_segmentation(
    data: str, split: str, image_column: str = "image", mask_column: str = "annotation", limit: int | None = None
) -> SegmentationImages:
    """Read a folder with `images` and `masks`, or a Hub dataset. Raises FileNotFoundError or ValueError."""
    folder = Path(data)
    if folder.is_dir():
        masks, images = _by_name(folder / "masks", (".png",)), _by_name(folder / "images", _IMAGE_SUFFIXES)
        if not masks and not images:
            raise BadValue("data", data, "a folder with images/NAME.jpg and masks/NAME.png")
        for name in sorted(masks.keys() ^ images.keys()):
            raise FileNotFoundError(f"{folder}: {'an image' if name in masks else 'a mask'} is missing for {name}")
        return SegmentationImages([(images[name], masks[name]) for name in sorted(masks)][:limit])
    if folder.exists() or data.startswith((".", "/", "~")):
        raise FileNotFoundError(f"data={data!r}: there is no such folder")
    dataset = load_dataset(data, split=split)
    for column in (image_column, mask_column):
        if column not in dataset.column_names:
            raise BadValue("image_column, mask_column", column, f"one of {dataset.column_names}")
    chosen = dataset if limit is None else dataset.select(range(min(limit, len(dataset))))
    return SegmentationImages(chosen, image_column, mask_column)


def _by_name(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """The files of a folder by their name without suffix. Raises ValueError for two files of one name."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*")):
        if path.suffix.lower() in suffixes and found.setdefault(path.stem, path) != path:
            raise BadValue("data", str(path), f"one file named {path.stem}; {found[path.stem].name} is another")
    return found
