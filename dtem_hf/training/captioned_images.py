"""Images with captions: for training, one caption of each image per epoch; for validation, all of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.augmentation import augmented_pixels
from ..data.captions import CaptionedImage
from ..evaluation.captions_generation import CaptionImages


Images = Mapping[int, CaptionedImage]


class CaptionedImages(torch.utils.data.Dataset):
    """{"pixel_values": [C, H, W], "caption": str, "caption_id", "index", "epoch": int} for i or (epoch, i).

    `index` counts images or, with `every_caption`, their captions one after the other; otherwise, which caption an
    image comes with depends on seed, epoch and index alone. `caption_id` counts the captions of all images. Raises
    FileNotFoundError where an image is not in the folder.
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
        self.images = CaptionImages(images, folder, processor)
        self.seed, self.augmentation = seed, augmentation
        lengths = [len(image.captions) for image in images.values()]
        self._first = np.concatenate([[0], np.cumsum(lengths)])
        self.every_caption = every_caption

    @property
    def num_captions(self) -> int:
        """The captions of all images."""
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
            draw = np.random.default_rng((self.seed, epoch, index, 1))  # 1: not what augmentation draws
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
    """Split images into those to learn from and `size` to validate on, which are the same in every run."""
    ids = list(images)
    chosen = set(np.random.default_rng(0).permutation(len(ids))[:size].tolist())
    parts: tuple[dict[int, CaptionedImage], dict[int, CaptionedImage]] = ({}, {})
    for place, image_id in enumerate(ids):
        parts[place in chosen][image_id] = images[image_id]
    return parts
