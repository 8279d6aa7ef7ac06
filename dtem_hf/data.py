"""Images to train on and to measure with: a Hub dataset, a folder of class folders, or one with a `labels.csv`."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from datasets import Image as ImageFeature
from torch import Tensor
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # at the top, 5.17 asks for torchvision

from .augmentation import augmented_pixels, check_augmentation
from .errors import BadValue


LABELS_NAME = "labels.csv"


def load_images(data: str, split: str = "train", limit: int | None = None) -> Dataset:
    """A dataset with columns `image` and `label` (-1 where there is none).

    `data` is a local folder with a `labels.csv` (columns `file` and `label`, empty for none), a local folder of class
    folders or parquet files, or a Hub dataset id, of which `split` is read. `limit` keeps the first so many. Raises
    FileNotFoundError or ValueError that names what is wrong.
    """
    folder = Path(data)
    if (folder / LABELS_NAME).is_file():
        dataset = _from_csv(folder)
    elif folder.is_dir():
        dataset = _one_split(load_dataset(str(folder)), split)
    elif folder.exists() or data.startswith((".", "/", "~")):
        raise FileNotFoundError(f"data={data!r}: there is no such folder")
    else:
        dataset = load_dataset(data, split=split)
    for column in ("image", "label"):
        if column not in dataset.column_names and column == "label":
            dataset = dataset.add_column("label", [-1] * len(dataset))
        elif column not in dataset.column_names:
            raise BadValue("data", data, f"a dataset with a column 'image', not {dataset.column_names}")
    if len(dataset) == 0:
        raise BadValue("data", data, "at least one image")
    return dataset if limit is None else dataset.select(range(min(limit, len(dataset))))


def _one_split(splits: Any, split: str) -> Dataset:
    """The split that was asked for, or the only one: a folder of class folders has just one."""
    if split not in splits and len(splits) > 1:
        raise BadValue("split", split, f"one of {', '.join(splits)}")
    return splits[split] if split in splits else next(iter(splits.values()))


def _from_csv(folder: Path) -> Dataset:
    files, labels = [], []
    with open(folder / LABELS_NAME, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if not {"file", "label"} <= set(reader.fieldnames or ()):
            raise BadValue(LABELS_NAME, reader.fieldnames, "a header with the columns file and label")
        for line, row in enumerate(reader, start=2):
            path = (folder / row["file"]).resolve()
            if not path.is_relative_to(folder.resolve()):
                raise BadValue(f"{LABELS_NAME} line {line}", row["file"], "a file inside the folder")
            if not path.is_file():
                raise FileNotFoundError(f"{LABELS_NAME} line {line}: there is no {row['file']} in {folder}")
            try:
                labels.append(int(row["label"]) if row["label"] else -1)
            except ValueError as error:
                raise BadValue(f"{LABELS_NAME} line {line}", row["label"], "a whole number, or nothing") from error
            files.append(str(path))
    return Dataset.from_dict({"image": files, "label": labels}).cast_column("image", ImageFeature())


def load_processor(model: str) -> Any:
    """The image processor of a model, on PIL, which needs no torchvision."""
    return AutoImageProcessor.from_pretrained(model, backend="pil")


@dataclass
class ProcessedImages(torch.utils.data.Dataset):
    """Images as a model takes them: pixel_values [C, H, W], labels, index and epoch (ints) for i or (epoch, i).

    What augmentation draws depends on seed, epoch and i alone, so a run that is resumed sees what it would have seen.
    """

    images: Dataset
    processor: Any
    augmentation: str = "none"
    seed: int = 0
    num_labels: int | None = None

    def __post_init__(self) -> None:
        check_augmentation(self.augmentation)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = item if isinstance(item, tuple) else (0, int(item))
        row = self.images[index]
        label = -1 if row["label"] is None else int(row["label"])
        if self.num_labels is not None and label >= self.num_labels:
            raise BadValue("label", label, f"image {index} needs one below the model's {self.num_labels} classes")
        return {
            "pixel_values": augmented_pixels(
                row["image"].convert("RGB"), self.processor, self.augmentation, (self.seed, epoch, index)
            ),
            "labels": label,
            "index": index,
            "epoch": epoch,
        }


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch: pixel_values [B, C, H, W]; labels, index and epoch [B]. Raises ValueError where sizes differ."""
    shapes = {tuple(item["pixel_values"].shape) for item in items}
    if len(shapes) > 1:
        raise BadValue("pixel_values", sorted(shapes), "images of one size; use a processor that crops or resizes")
    return {
        "pixel_values": torch.stack([item["pixel_values"] for item in items]).contiguous(),
        **{name: torch.tensor([item[name] for item in items]) for name in ("labels", "index", "epoch")},
    }
