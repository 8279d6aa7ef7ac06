"""Datasets of images with captions, and batches of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import BadValue
from ..opening import files_digest, open_image
from .augmentation import augmented_pixels
from .captions import CaptionedImage


# The entries of a batch that a captioning model reads.
MODEL_INPUTS = ("pixel_values", "input_ids", "attention_mask")
Images = Mapping[int, CaptionedImage]


@dataclass
class ImageFolder(torch.utils.data.Dataset):
    """Images of a folder as pixel values: {"pixel_values": [C, H, W], "image_id": int}."""

    images: Images
    folder: Path
    processor: Any

    def __post_init__(self) -> None:
        self.ids = list(self.images)
        missing = [image.file_name for image in self.images.values() if not self._path(image).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of {len(self.ids)} images are not in {self.folder}: {missing[0]}, …"
            )

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels = self.processor(images=self.open(index), return_tensors="pt").pixel_values[0]
        return {"pixel_values": pixels, "image_id": self.ids[index]}

    def captioned(self, index: int) -> CaptionedImage:
        """An image's name and captions."""
        return self.images[self.ids[index]]

    def open(self, index: int) -> Image.Image:
        """An image, in RGB. Raises UnreadableImage that names it."""
        path = self._path(self.captioned(index))
        return open_image(path, path.name)

    def digest(self) -> str:
        """A short hash of ids, names and sizes of all images, and of the content of at least 2,000 of them."""
        paths = [self._path(image) for image in self.images.values()]
        return files_digest(((f"{i}:{path.name}", path) for i, path in zip(self.ids, paths, strict=True)), len(self))

    def _path(self, image: CaptionedImage) -> Path:
        path = (self.folder / image.file_name).resolve()
        if not path.is_relative_to(self.folder.resolve()):
            raise BadValue("file_name", image.file_name, "a file inside the folder of images")
        return path


class CaptionedImages(torch.utils.data.Dataset):
    """Item i or (epoch, i): {"pixel_values": [C, H, W], "caption": str, "caption_id", "index", "epoch": int}.

    `index` counts images, or with `every_caption` the captions of all images. Without it, one caption of the image is
    drawn, by seed, epoch and index only. `caption_id` counts the captions of all images. Raises FileNotFoundError if
    an image is not in the folder.
    """

    def __init__(
        self,
        images: Images,
        folder: Path,
        processor: Any,
        seed: int = 0,
        augmentation: str = "none",
        every_caption: bool = False,
    ) -> None:
        self.images = ImageFolder(images, folder, processor)
        self.seed, self.augmentation = seed, augmentation
        lengths = [len(image.captions) for image in images.values()]
        self._first = np.concatenate([[0], np.cumsum(lengths)])
        self.every_caption = every_caption

    @property
    def num_captions(self) -> int:
        """The number of captions of all images."""
        return int(self._first[-1])

    def __len__(self) -> int:
        return self.num_captions if self.every_caption else len(self.images)

    def __getitem__(self, item: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = item if isinstance(item, tuple) else (0, int(item))
        if self.every_caption:
            image = int(np.searchsorted(self._first, index, side="right")) - 1
            number = index - int(self._first[image])
        else:
            image = index
            draw = np.random.default_rng((self.seed, epoch, index, 1))  # 1: other numbers than in augmentation
            number = int(draw.integers(self._first[image + 1] - self._first[image]))
        key = (self.seed, epoch, index)
        return {
            "pixel_values": augmented_pixels(self.images.open(image), self.images.processor, self.augmentation, key),
            "caption": self.images.captioned(image).captions[number],
            "caption_id": int(self._first[image]) + number,
            "index": index,
            "epoch": epoch,
        }


def hold_out(images: Images, size: int) -> tuple[Images, Images]:
    """Split images into a training part and `size` images to validate on; the split is the same in every run."""
    ids = list(images)
    chosen = set(np.random.default_rng(0).permutation(len(ids))[:size].tolist())
    parts: tuple[dict[int, CaptionedImage], dict[int, CaptionedImage]] = ({}, {})
    for place, image_id in enumerate(ids):
        parts[place in chosen][image_id] = images[image_id]
    return parts


class CaptionCollate:
    """Make batches: pixel_values [B, C, H, W]; input_ids, attention_mask, labels [B, T]; index, epoch, caption_id [B].

    Labels are -100 at padding.
    """

    def __init__(self, tokenizer: Any, options: dict[str, Any]) -> None:
        self.tokenizer, self.options = tokenizer, options

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        text = self.tokenizer(
            [item["caption"] for item in items],
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
            **self.options,
        )
        return {
            "pixel_values": torch.stack([item["pixel_values"] for item in items]),
            "input_ids": text["input_ids"],
            "attention_mask": text["attention_mask"],
            "labels": text["input_ids"].masked_fill(text["attention_mask"] == 0, -100),
            **{name: torch.tensor([item[name] for item in items]) for name in ("index", "epoch", "caption_id")},
        }
