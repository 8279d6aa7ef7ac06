"""Augmentation of training images. Flips and plain crops are done here, all else by kornia (`dtem-hf[train]`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import BadValue


# The last two follow DeiT's recipe: crop and flip, a policy (RandAugment or TrivialAugment), random erasing.
AUGMENTATIONS = ("none", "flip", "crop_flip", "resized_crop", "randaugment", "trivialaugment")
# As in timm and DeiT: two operations of strength 9 (of kornia's 30), and a quarter of the images erased in part.
_OPERATIONS, _MAGNITUDE, _ERASED = 2, 9, 0.25


def augmented_pixels(image: Image.Image, processor: Any, augmentation: str, key: Sequence[int]) -> Tensor:
    """The augmented pixel values of an RGB image, [C, H, W]. Random numbers depend only on `key`."""
    if augmentation in ("none", "flip", "crop_flip"):
        return _processed(image, processor, augmentation, key)
    height, width = model_size(processor)
    pixels = _as_tensor(image, 2 * max(height, width))
    with drawn_from(key):
        pixels = _pipeline(augmentation, height, width)(pixels)
    if getattr(processor, "do_normalize", False):
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (processor.image_mean, processor.image_std))
        pixels = (pixels - mean) / std
    if augmentation == "resized_crop":
        return pixels[0]
    with drawn_from((*key, 1)):
        return _erasing()(pixels)[0]


@contextmanager
def drawn_from(key: Sequence[int]) -> Iterator[None]:
    """Inside the block torch's random numbers depend only on `key`; afterwards torch's random state is restored."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(np.random.SeedSequence(tuple(key)).generate_state(1, np.uint64)[0] >> 1))
        yield


def model_size(processor: Any) -> tuple[int, int]:
    """Height and width of the images that a processor makes. Raises ValueError if they vary."""
    size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
    height, width = size.get("height"), size.get("width")
    if not height or not width:
        raise BadValue("augmentation", dict(size), "a processor that makes images of one size (height and width)")
    return height, width


def _processed(image: Image.Image, processor: Any, augmentation: str, key: Sequence[int]) -> Tensor:
    crops = augmentation == "crop_flip" and getattr(processor, "do_center_crop", False)
    options = {"do_center_crop": False} if crops else {}
    pixels = processor(image, return_tensors="pt", **options).pixel_values[0]
    pixels = pixels[0] if pixels.dim() == 4 else pixels  # if the processor makes tiles, the first one
    if augmentation == "none":
        return pixels
    draw = np.random.default_rng(tuple(key))
    if crops:
        height, width = model_size(processor)
        slack = (max(pixels.shape[1] - height, 0), max(pixels.shape[2] - width, 0))
        top, left = (int(draw.integers(0, extent + 1)) for extent in slack)
        pixels = pixels[:, top : top + height, left : left + width]
    return pixels.flip(-1) if draw.random() < 0.5 else pixels


def _as_tensor(image: Image.Image, largest: int) -> Tensor:
    """An image as a tensor [1, C, H, W] in [0, 1].

    Pillow shrinks an image whose shorter side is above `largest`, because kornia's crops do not smooth.
    """
    shortest = min(image.size)
    if shortest > largest:
        width, height = (round(side * largest / shortest) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2.0)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).unsqueeze(0) / 255


@cache
def _pipeline(augmentation: str, height: int, width: int) -> Any:
    import kornia.augmentation as parts

    crop = parts.RandomResizedCrop((height, width), scale=(0.08, 1.0), resample="BICUBIC")
    steps = [crop, parts.RandomHorizontalFlip(p=0.5), torch.nn.Hardtanh(0, 1)]  # bicubic overshoots
    if augmentation == "randaugment":
        steps.append(parts.auto.RandAugment(_OPERATIONS, _MAGNITUDE))
    elif augmentation == "trivialaugment":
        steps.append(parts.auto.TrivialAugment())
    return torch.nn.Sequential(*steps)


@cache
def _erasing() -> Any:
    import kornia.augmentation as parts

    return parts.RandomErasing(p=_ERASED, scale=(0.02, 1 / 3), ratio=(0.3, 3.3))
