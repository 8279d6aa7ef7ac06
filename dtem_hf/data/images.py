"""Images for training and evaluation: from the Hub, a folder, parquet or WebDataset shards, or a `labels.csv`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, Features, IterableDataset, Value, load_dataset
from datasets import Image as ImageFeature
from torch import Tensor

from ..errors import BadValue
from ..files import check_is_there
from ..opening import SHARD_KEY, files_digest, open_image, row_name
from ..programs.processes import say
from .augmentation import augmented_pixels
from .classes import AS_NUMBERS, ClassMap, bad_label
from .folders import LABEL_COLUMNS, NO_LABELS, UNDECODED, image_name, load_folder, named_labels, no_such_column


def load_images(data: str, split: str = "train", limit: int | None = None, label_column: str | None = None) -> Dataset:
    """Load a dataset with the columns `image` and `label` (-1: no label; with class names, if the data have them).

    `data` is a local folder with a `labels.csv` (columns `file` and `label`; an empty label means none), a local
    folder of class folders, parquet files or WebDataset's tar files, or a Hub dataset id. `split` is the split to
    read, and `limit` keeps only the first images. `label_column` defaults to `label`, `labels` or `cls`; "none" reads
    no labels. Raises FileNotFoundError or ValueError that names what is wrong.
    """
    dataset = _load(data, split, False, label_column)
    if len(dataset) == 0:
        raise BadValue("data", data, "at least one image")
    if "label" not in dataset.column_names:
        dataset = dataset.add_column("label", [-1] * len(dataset))
    return dataset if limit is None else dataset.select(range(min(limit, len(dataset))))


def stream_images(data: str, split: str = "train", label_column: str | None = None) -> IterableDataset:
    """Stream the data of `load_images`: rows with an undecoded `image` and, if the data have labels, `label`."""
    dataset = _load(data, split, True, label_column)
    kept = [name for name in ("image", "label", SHARD_KEY) if name in dataset.column_names]
    return dataset.select_columns(kept).cast_column("image", UNDECODED)


def num_images(stream: IterableDataset, split: str) -> int | None:
    """The number of images in a stream; None if its dataset does not tell."""
    known = (stream.info.splits or {}).get(split)
    return known.num_examples if known is not None and known.num_examples else None


def first_rows(stream: IterableDataset, count: int, data: str) -> Dataset:
    """The first `count` images of a stream, as a dataset in memory; without labels, the label is -1."""
    rows = list(stream.take(count))
    if not rows:
        raise BadValue("data", data, "at least one image")
    images = {"image": [row["image"] for row in rows], "label": [row.get("label", -1) for row in rows]}
    kind = (stream.features or {}).get("label")
    return Dataset.from_dict(images, Features({"image": ImageFeature(), "label": kind or Value("int64")}))


def data_digest(images: Dataset) -> str:
    """A short hash of names, sizes and labels of all images, and of the content of at least 2,000 of them."""
    rows = images.select_columns(["image", "label"]).cast_column("image", UNDECODED)
    named = ((row["image"], f"{Path(row['image']['path'] or '').name}:{row['label']}") for row in rows)
    return files_digest(((text, image["bytes"] or image["path"]) for image, text in named), len(images))


def _load(data: str, split: str, streaming: bool, label_column: str | None) -> Any:
    folder = Path(data)
    if folder.is_dir():
        return _standard_columns(*load_folder(folder, split, streaming, label_column), data)
    if folder.exists():
        raise FileNotFoundError(f"data={data!r}: there is no such folder; this is a file")
    check_is_there(data)
    return _standard_columns(load_dataset(data, split=split, streaming=streaming), label_column, data)


def _standard_columns(dataset: Any, label_column: str | None, data: str) -> Any:
    """Give columns their standard names and types: WebDataset names them by file endings, others `img` or `labels`."""
    names = list(dataset.column_names or [])
    pictures = [name for name, feature in (dataset.features or {}).items() if isinstance(feature, ImageFeature)]
    if "image" not in names:
        if len(pictures) != 1:
            raise BadValue("data", data, f"a dataset with a column 'image', not {names}")
        dataset = dataset.rename_column(pictures[0], "image")
    elif "image" not in pictures:  # bytes, or a struct of bytes and path, as other programs write it
        dataset = dataset.cast_column("image", ImageFeature())
    if label_column == NO_LABELS:
        return dataset.remove_columns("label") if "label" in names else dataset
    wanted = label_column
    if label_column is None:
        wanted = next((name for name in LABEL_COLUMNS if name in names), None)
        others = [name for name in names if name not in (SHARD_KEY, "__url__", *pictures, "image")]
        if wanted is None and others:
            say(f"no labels: the columns of the data are {', '.join(names)}; choose one with --label_column")
        if wanted is None:
            return dataset
    if wanted not in names:
        raise no_such_column(str(wanted), names)
    if wanted != "label":
        dataset = dataset.remove_columns("label") if "label" in names else dataset
        dataset = dataset.rename_column(wanted, "label")
    return _with_numbers(dataset, data)


def _with_numbers(dataset: Any, data: str) -> Any:
    """Make labels numbers; text labels become named classes. Raises ValueError for other types."""
    kind = (dataset.features or {}).get("label")
    dtype = str(getattr(kind, "dtype", kind))
    if kind is None or isinstance(kind, ClassLabel) or "int" in dtype:
        return dataset
    if dtype != "string" or isinstance(dataset, IterableDataset):
        raise BadValue("data", data, f"a column of whole numbers as labels, not {dtype}")
    labels, feature = named_labels(dataset["label"])
    return dataset.remove_columns("label").add_column("label", labels, feature=feature)


@dataclass
class ProcessedImages(torch.utils.data.Dataset):
    """Item i or (epoch, i): pixel_values [C, H, W], and labels, index and epoch (ints).

    For (epoch, i, row) it reads the given row, and `images` may be None. `classes` maps labels to the model's classes.
    Augmentation depends only on seed, epoch and i, so a resumed run repeats it. Raises UnreadableImage.
    """

    images: Any
    processor: Any
    augmentation: str = "none"
    seed: int = 0
    num_labels: int | None = None
    classes: ClassMap = AS_NUMBERS

    def __post_init__(self) -> None:
        if self.images is not None:  # `__getitem__` decodes, and can name an unreadable image
            self.images = self.images.cast_column("image", UNDECODED)

    def __len__(self) -> int:
        return 0 if self.images is None else len(self.images)

    def __getitem__(self, item: int | tuple[int, int] | tuple[int, int, dict[str, Any]]) -> dict[str, Any]:
        epoch, index, *given = item if isinstance(item, tuple) else (0, int(item))
        row = given[0] if given else self.images[index]
        label = -1 if row.get("label") is None else self.classes.class_of(int(row["label"]))
        if self.num_labels is not None and not -1 <= label < self.num_labels:
            raise bad_label(label, index, row_name(row, index), self.num_labels)
        image = open_image(row["image"], row_name(row, index))
        return {
            "pixel_values": augmented_pixels(image, self.processor, self.augmentation, (self.seed, epoch, index)),
            "labels": label,
            "index": index,
            "epoch": epoch,
        }

    def open(self, index: int) -> Any:
        """Image `index`, in RGB."""
        row = self.images[index]
        return open_image(row["image"], row_name(row, index))

    def name_of(self, index: int) -> str:
        """The name of image `index`: its file, or its number."""
        return image_name(self.images, index)


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Make a batch: pixel_values [B, C, H, W]; labels, index and epoch [B]. Raises ValueError if sizes differ."""
    shapes = {tuple(item["pixel_values"].shape) for item in items}
    if len(shapes) > 1:
        raise BadValue("pixel_values", sorted(shapes), "images of one size; use a processor that crops or resizes")
    return {
        "pixel_values": torch.stack([item["pixel_values"] for item in items]).contiguous(),
        **{name: torch.tensor([item[name] for item in items]) for name in ("labels", "index", "epoch")},
    }
