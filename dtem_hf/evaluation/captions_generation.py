"""Captions by a model that reads images, under several methods and amounts of merging, in one pass over the images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from ..data.captions import CaptionedImage
from ..data.images import files_digest, naming_unreadable
from ..errors import BadValue
from ..families import find_backbone
from ..models.vision import image_part
from .parts import Columns, Parts
from .variants import Variant, run_in_turn


@dataclass
class CaptionImages(torch.utils.data.Dataset):
    """Images of a folder as a model takes them: {"pixel_values": [C, H, W], "image_id": int}."""

    images: Mapping[int, CaptionedImage]
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
        with naming_unreadable(path.name, index), Image.open(path) as image:
            return image.convert("RGB")

    def digest(self) -> str:
        """A short hash of what is read: ids, names and sizes of all images, and the content of 2,000 of them."""
        paths = [self._path(image) for image in self.images.values()]
        return files_digest(((f"{i}:{path.name}", path) for i, path in zip(self.ids, paths, strict=True)), len(self))

    def _path(self, image: CaptionedImage) -> Path:
        path = (self.folder / image.file_name).resolve()
        if not path.is_relative_to(self.folder.resolve()):
            raise BadValue("file_name", image.file_name, "a file inside the folder of images")
        return path


def generate_captions(
    variants: Sequence[Variant],
    images: CaptionImages,
    batches: Sequence[Sequence[int]],
    parts: Parts,
    tokenizer: Any,
    settings: Mapping[str, Any],
    device: torch.device,
    num_workers: int = 0,
) -> None:
    """Let every row caption each unfinished batch that falls to this process, and keep the texts in `parts`.

    `settings` are `generate`'s. The first batch of a process warms up and is not timed.
    """
    mine = parts.share(len(batches))
    loader = DataLoader(images, batch_sampler=[list(batches[number]) for number in mine], num_workers=num_workers)
    shown = parts.state.is_main_process
    progress = tqdm(loader, desc="caption", unit="batch", disable=not shown)
    if shown and parts.finished():
        progress.write(f"{len(parts.finished())} of {len(batches)} batches were finished before")
    for place, (number, batch) in enumerate(zip(mine, progress, strict=True)):
        columns = caption_batch(variants, batch, tokenizer, settings, device, first=number % len(variants))
        if place == 0:
            columns["seconds_per_image"][:] = np.nan
        parts.write(number, columns)
    parts.state.wait_for_everyone()


@torch.inference_mode()
def caption_batch(
    variants: Sequence[Variant],
    batch: dict[str, Tensor],
    tokenizer: Any,
    settings: Mapping[str, Any],
    device: torch.device,
    first: int = 0,
) -> Columns:
    """Captions of all R rows, row `first` first: `image_id` [B], `captions` [R, B], `seconds_per_image` [R]."""
    pixels = batch["pixel_values"].to(device=device, dtype=variants[0].model.dtype)
    written, seconds = run_in_turn(
        variants, lambda model: model.generate(pixel_values=pixels, **settings), device, first
    )
    captions = [[text.strip() for text in tokenizer.batch_decode(row, skip_special_tokens=True)] for row in written]
    return {
        "image_id": batch["image_id"].numpy(),
        "captions": np.array(captions, dtype=np.str_),
        "seconds_per_image": seconds / len(pixels),
    }


@torch.no_grad()
def count_generation(variant: Variant, pixels: Tensor, settings: Mapping[str, Any]) -> dict[str, int]:
    """Multiply-adds of one caption of the greatest length: of the image encoder and of all the rest, the decoding.

    pixels [1, C, H, W]. As much is counted as `generate` does: if it encodes an image once per beam, that is counted.
    """
    length = settings["max_new_tokens"]
    with variant.ready() as model, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.generate(pixel_values=pixels, **{**settings, "min_new_tokens": length})
        encoder = find_backbone(model)[1]
        part = image_part(model, encoder)
        name = next(name for name, module in model.named_modules() if module is part)
    inside = counter.get_flop_counts().get(f"{type(model).__name__}.{name}", {})
    encoding = sum(inside.values()) // 2
    return {
        "encoder_multiply_adds": encoding,
        "decoding_multiply_adds": counter.get_total_flops() // 2 - encoding,
    }
