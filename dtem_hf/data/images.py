"""Images to train on and to measure with: from the Hub, a folder, parquet or WebDataset shards, or a `labels.csv`."""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch
from datasets import ClassLabel, Dataset, Features, IterableDataset, Value, load_dataset
from datasets import Image as ImageFeature
from datasets.exceptions import DatasetGenerationError
from PIL import Image
from torch import Tensor
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # at the top, 5.17 asks for torchvision

from ..errors import BadValue
from .augmentation import augmented_pixels, check_augmentation


LABELS_NAME = "labels.csv"
_COLUMNS = Features({"image": ImageFeature(), "label": Value("int64")})
_UNDECODED = ImageFeature(decode=False)
# WebDataset's: what an example is called, and the ending of the file that holds its label.
_SHARD_KEY = "__key__"
_LABEL_COLUMNS = ("labels", "cls")
_CSV_SHARDS = 64
_DIGESTED = 2000


def load_images(data: str, split: str = "train", limit: int | None = None) -> Dataset:
    """A dataset with columns `image` and `label` (-1 where there is none).

    `data` is a local folder with a `labels.csv` (columns `file` and `label`, empty for none), a local folder of class
    folders, parquet files or WebDataset's tar files, or a Hub dataset id, of which `split` is read. `limit` keeps the
    first so many. Raises FileNotFoundError or ValueError that names what is wrong.
    """
    dataset = _standard_columns(_load(data, split, streaming=False), data)
    if "label" not in dataset.column_names:
        dataset = dataset.add_column("label", [-1] * len(dataset))
    if len(dataset) == 0:
        raise BadValue("data", data, "at least one image")
    return dataset if limit is None else dataset.select(range(min(limit, len(dataset))))


def stream_images(data: str, split: str = "train") -> IterableDataset:
    """What `load_images` loads, read as it arrives: rows with `image` undecoded and, where there are any, `label`."""
    dataset = _standard_columns(_load(data, split, streaming=True), data)
    kept = [name for name in ("image", "label", _SHARD_KEY) if name in dataset.column_names]
    return dataset.select_columns(kept).cast_column("image", _UNDECODED)


def num_images(stream: IterableDataset, split: str) -> int | None:
    """How many images a stream has, if its dataset tells."""
    known = (stream.info.splits or {}).get(split)
    return known.num_examples if known is not None and known.num_examples else None


def first_rows(stream: IterableDataset, count: int, data: str) -> Dataset:
    """The first `count` images of a stream, held in memory; -1 where there is no label."""
    rows = list(stream.take(count))
    if not rows:
        raise BadValue("data", data, "at least one image")
    images = {"image": [row["image"] for row in rows], "label": [row.get("label", -1) for row in rows]}
    return Dataset.from_dict(images, _COLUMNS)


def check_labels(images: Dataset, num_labels: int | None) -> None:
    """Raise ValueError that names the first image with a label that a model of `num_labels` classes has not.

    None: labels are not looked at.
    """
    if num_labels is None:
        return
    labels = images.select_columns(["label"]).with_format("arrow")[:]["label"]
    wrong = pc.or_(pc.greater_equal(labels, num_labels), pc.less(labels, -1))
    index = pc.index(wrong, True).as_py()
    if index >= 0:
        raise _bad_label(labels[index].as_py(), index, image_name(images, index), num_labels)


def _bad_label(label: int, index: int, name: str, num_labels: int) -> BadValue:
    expected = f"image {index} needs one below the model's {num_labels} classes"
    return BadValue("label", label, expected if name == str(index) else f"{expected} ({name})")


def data_digest(images: Dataset) -> str:
    """A short hash of what is read: names, sizes and labels of all images, and the content of 2,000 of them."""
    rows = images.select_columns(["image", "label"]).cast_column("image", _UNDECODED)
    named = ((row["image"], f"{Path(row['image']['path'] or '').name}:{row['label']}") for row in rows)
    return files_digest(((text, image["bytes"] or image["path"]) for image, text in named), len(images))


def files_digest(files: Iterable[tuple[str, Any]], count: int) -> str:
    """A short hash of `count` files, each given as what to call it and its path or content.

    The sizes of all of them count, and the content of 2,000 that are spread evenly.
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


def _load(data: str, split: str, streaming: bool) -> Any:
    folder = Path(data)
    if (folder / LABELS_NAME).is_file():
        listed = _from_csv(folder)
        if len(listed) == 0:
            raise BadValue("data", data, "at least one image")
        return listed.to_iterable_dataset(min(len(listed), _CSV_SHARDS)) if streaming else listed
    if folder.is_dir():
        try:
            return _one_split(load_dataset(str(folder), streaming=streaming), split)
        except (FileNotFoundError, DatasetGenerationError) as error:
            reason = str(error.__cause__ or error).splitlines()[0]
            raise BadValue(
                "data", data, f"a folder of at least one image, parquet file or WebDataset tar file ({reason})"
            ) from error
    if folder.exists() or data.startswith((".", "/", "~")):
        raise FileNotFoundError(f"data={data!r}: there is no such folder")
    return load_dataset(data, split=split, streaming=streaming)


def _standard_columns(dataset: Any, data: str) -> Any:
    """Name and type the columns: WebDataset calls them by file endings, others `img` or `labels`."""
    names = dataset.column_names or []
    pictures = [name for name, feature in (dataset.features or {}).items() if isinstance(feature, ImageFeature)]
    if "image" not in names:
        if len(pictures) != 1:
            raise BadValue("data", data, f"a dataset with a column 'image', not {names}")
        dataset = dataset.rename_column(pictures[0], "image")
    elif "image" not in pictures:  # bytes, or a struct of bytes and path, of a file written by other programs
        dataset = dataset.cast_column("image", ImageFeature())
    for other in _LABEL_COLUMNS:
        if "label" not in dataset.column_names and other in names:
            dataset = dataset.rename_column(other, "label")
    kind = (dataset.features or {}).get("label")
    if kind is not None and not isinstance(kind, ClassLabel) and "int" not in str(getattr(kind, "dtype", kind)):
        raise BadValue("data", data, f"a column of whole numbers as labels, not {getattr(kind, 'dtype', kind)}")
    return dataset


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
    return Dataset.from_dict({"image": files, "label": labels}, _COLUMNS)


def load_processor(model: str) -> Any:
    """The image processor of a model, on PIL, which needs no torchvision."""
    return AutoImageProcessor.from_pretrained(model, backend="pil")


@dataclass
class ProcessedImages(torch.utils.data.Dataset):
    """Images as a model takes them: pixel_values [C, H, W], labels, index and epoch (ints) for i or (epoch, i).

    (epoch, i, row) brings its own row, and `images` may be None. What augmentation draws depends on seed, epoch and i
    alone, so a run that is resumed sees what it would have seen. Raises UnreadableImage.
    """

    images: Any
    processor: Any
    augmentation: str = "none"
    seed: int = 0
    num_labels: int | None = None

    def __post_init__(self) -> None:
        check_augmentation(self.augmentation)
        if self.images is not None:  # decoded here, where it is known which image it is that cannot be
            self.images = self.images.cast_column("image", _UNDECODED)

    def __len__(self) -> int:
        return 0 if self.images is None else len(self.images)

    def __getitem__(self, item: int | tuple[int, int] | tuple[int, int, dict[str, Any]]) -> dict[str, Any]:
        epoch, index, *given = item if isinstance(item, tuple) else (0, int(item))
        row = given[0] if given else self.images[index]
        label = -1 if row.get("label") is None else int(row["label"])
        if self.num_labels is not None and not -1 <= label < self.num_labels:
            raise _bad_label(label, index, row_name(row, index), self.num_labels)
        image = open_image(row["image"], row_name(row, index), index)
        return {
            "pixel_values": augmented_pixels(image, self.processor, self.augmentation, (self.seed, epoch, index)),
            "labels": label,
            "index": index,
            "epoch": epoch,
        }

    def name_of(self, index: int) -> str:
        """What image `index` is called: its file, or its number."""
        return image_name(self.images, index)


class UnreadableImage(ValueError):
    """An image cannot be decoded; `name` says which, and `index` where it is in the data."""

    # What a DataLoader raises again on behalf of a worker is made of the message alone.
    def __init__(self, message: str, name: str = "", index: int = -1) -> None:
        super().__init__(message)
        self.name, self.index = name, index


def open_image(value: Any, name: str, index: int = -1) -> Image.Image:
    """Decode what an undecoded image column holds, to RGB. Raises UnreadableImage that names it."""
    with naming_unreadable(name, index):
        return ImageFeature().decode_example(value).convert("RGB")


@contextmanager
def naming_unreadable(name: str, index: int = -1) -> Iterator[None]:
    """Whatever is raised inside the block becomes UnreadableImage: broken files lead decoders to anything."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise UnreadableImage(
            f"image {name} cannot be read ({reason}); mend it, or leave such images out with --on_bad_image skip",
            name,
            index,
        ) from error


def row_name(row: dict[str, Any], index: int) -> str:
    """What an image is called: its file, its key in a shard, or its number."""
    image = row["image"] if isinstance(row.get("image"), dict) else {}
    return row.get(_SHARD_KEY) or image.get("path") or str(index)


def image_name(images: Dataset, index: int) -> str:
    """What image `index` of a dataset is called."""
    return row_name(images.select([index]).cast_column("image", _UNDECODED)[0], index)


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch: pixel_values [B, C, H, W]; labels, index and epoch [B]. Raises ValueError where sizes differ."""
    shapes = {tuple(item["pixel_values"].shape) for item in items}
    if len(shapes) > 1:
        raise BadValue("pixel_values", sorted(shapes), "images of one size; use a processor that crops or resizes")
    return {
        "pixel_values": torch.stack([item["pixel_values"] for item in items]).contiguous(),
        **{name: torch.tensor([item[name] for item in items]) for name in ("labels", "index", "epoch")},
    }
