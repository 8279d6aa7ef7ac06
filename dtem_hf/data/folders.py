"""Local folders of images, parquet files or WebDataset's tar files. A message says which files are not read.

Top folders are splits only if all of them have names of splits (train, val, test, ...). The same holds for file names.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from datasets import ClassLabel, Dataset, Features, Value, load_dataset
from datasets import Image as ImageFeature
from datasets.exceptions import DatasetGenerationError
from PIL import Image

from ..errors import BadValue, first_line
from ..opening import row_name
from ..programs.arguments import LABELS_NAME
from ..programs.processes import say


UNDECODED = ImageFeature(decode=False)
LABEL_COLUMNS = ("label", "labels", "cls")
# Value of the option label_column for "read no labels".
NO_LABELS = "none"
_METADATA = ("metadata.csv", "metadata.jsonl")
_SHARDS = {".parquet": "parquet", ".tar": "webdataset"}
_SPLITS = {
    word: split
    for split, words in {
        "train": ("train", "training"),
        "validation": ("validation", "valid", "val", "dev"),
        "test": ("test", "testing", "eval", "evaluation"),
    }.items()
    for word in words
}
_STREAMED_PARTS = 64


def image_name(images: Dataset, index: int) -> str:
    """The name of image `index` of a dataset."""
    return row_name(images.select([index]).cast_column("image", UNDECODED)[0], index)


def load_folder(folder: Path, split: str, streaming: bool, label_column: str | None = None) -> tuple[Any, str | None]:
    """The data set in a folder, and the column that the caller must still read labels from (None: already read)."""
    if (folder / LABELS_NAME).is_file():
        listed = _from_csv(folder, label_column)
    else:
        files = [PurePosixPath(path.relative_to(folder).as_posix()) for path in _files(folder)]
        shards = [path for path in files if path.suffix.lower() in _SHARDS]
        Image.init()
        suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
        images = [path for path in files if path.suffix.lower() in suffixes]
        if shards and images:
            raise BadValue("data", str(folder), f"a folder of images or of shards, not both: {images[0]}, {shards[0]}")
        if shards:
            return _from_shards(folder, shards, split, streaming), label_column
        if not images:
            raise BadValue("data", str(folder), "a folder of at least one image, parquet file or WebDataset tar file")
        if left_out := Counter(path.suffix for path in {*files} - {*images} if path.name not in _METADATA):
            kinds = ", ".join(f"{count} × {suffix or 'no ending'}" for suffix, count in sorted(left_out.items())[:5])
            say(
                f"data: files in {folder.name} that are no images, or that Pillow does not open, are left out: {kinds}"
            )
        listed = _from_images(folder, images, split, label_column)
    if len(listed) == 0:
        raise BadValue("data", str(folder), "at least one image")
    return listed.to_iterable_dataset(min(len(listed), _STREAMED_PARTS)) if streaming else listed, None


def read_table(path: Path, *needed: str) -> tuple[list[str], list[tuple[str, dict[str, Any]]]]:
    """The columns of a CSV file, and its rows as pairs of the line's name and the fields.

    Raises FileNotFoundError, or ValueError for a header without the columns `needed`, a row with too many fields, or a
    file that is no table in UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path.name} in {path.parent}")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = list(reader.fieldnames or ())
            rows: list[tuple[str, Any]] = [(f"{path.name} line {n}", row) for n, row in enumerate(reader, start=2)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadValue(path.name, str(path), f"a table in UTF-8 ({error})") from error
    if not set(needed) <= set(columns):
        raise BadValue(path.name, columns, f"a header with the columns {' and '.join(needed)}")
    for where, row in rows:
        if None in row:  # surplus fields, which come from an unquoted comma
            raise BadValue(where, row[None], f"{len(columns)} fields; quote commas in cells")
    return columns, rows


def named_labels(values: Sequence[str | None]) -> tuple[list[int], Any]:
    """Labels as numbers, and their feature: class numbers if all are numbers, else indices into the sorted names."""
    present = sorted({value for value in values if value})
    if all(re.fullmatch(r"-?\d+", value) for value in present):
        return [int(value) if value else -1 for value in values], Value("int64")
    place = {name: i for i, name in enumerate(present)}
    return [place[value] if value else -1 for value in values], ClassLabel(names=present)


def _files(folder: Path, above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """All files, also behind links to folders, without names that begin with a dot."""
    real = os.path.realpath(folder)
    if real in above:  # a link to a parent folder
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _files(path, above | {real})
        else:
            yield path


def _from_images(folder: Path, images: Sequence[PurePosixPath], split: str, label_column: str | None) -> Dataset:
    images = sorted(images)
    common = PurePosixPath(os.path.commonpath([path.parent for path in images]) or ".")
    tops = {path.relative_to(common).parts[0] for path in images if path.parent != common}
    if tops and all(path.parent != common for path in images) and tops <= set(_SPLITS):
        wanted = _chosen({_SPLITS[top] for top in tops}, split)
        inside = [path for path in images if _SPLITS[path.relative_to(common).parts[0]] == wanted]
        say(f"data: {len(inside)} of {len(images)} images in {folder.name}, those of split {wanted}")
        images = inside
    listed = {"image": [str(folder / path) for path in images]}
    if label_column == NO_LABELS:
        return Dataset.from_dict(listed, Features({"image": ImageFeature()}))
    names, columns = _names_in_metadata(folder, images, label_column)
    if names is None:
        names = _names_of_folders(images)
        if names is None:
            why = f"the images are not in two or more class folders, and there is no {LABELS_NAME}"
            if columns:
                why = f"the metadata has the columns {', '.join(columns)}; choose one with --label_column"
            say(f"no labels: {why}")
            return Dataset.from_dict(listed, Features({"image": ImageFeature()}))
    labels, kind = named_labels(names)
    return Dataset.from_dict({**listed, "label": labels}, Features({"image": ImageFeature(), "label": kind}))


def _names_of_folders(images: Sequence[PurePosixPath]) -> list[str | None] | None:
    """Each image's class: its folder, or the top folder if the depths differ; None for a single folder."""
    common = PurePosixPath(os.path.commonpath([path.parent for path in images]) or ".")
    inner = [path.relative_to(common) for path in images]
    if len({path.parent for path in inner}) < 2:
        return None
    even = len({len(path.parts) for path in inner}) == 1
    return [None if len(path.parts) == 1 else path.parts[-2 if even else 0] for path in inner]


def _names_in_metadata(
    folder: Path, images: Sequence[PurePosixPath], label_column: str | None
) -> tuple[list[str | None] | None, list[str]]:
    """Labels of the images from `metadata.csv` or `.jsonl` files (None without such files), and the files' columns."""
    found: dict[PurePosixPath, Any] = {}
    columns: list[str] = []
    for place in sorted({path.parent for path in images} | {PurePosixPath(".")}):
        for name in _METADATA:
            if (folder / place / name).is_file():
                for row in _rows(folder / place / name):
                    columns = columns or [column for column in row if column != "file_name"]
                    column = label_column or next((c for c in LABEL_COLUMNS if c in row), None)
                    if column in row and "file_name" in row:
                        found[place / row["file_name"]] = row[column]
    if label_column is not None and label_column not in columns:
        raise no_such_column(label_column, columns)
    if not found:
        return None, columns
    values = [found.get(path) for path in images]
    return [None if value is None else str(value) for value in values], columns


def no_such_column(label_column: str, columns: Sequence[str]) -> BadValue:
    """The error for a label column that the data lack."""
    return BadValue("label_column", label_column, f"one of the columns {', '.join(columns) or '(there are none)'}")


def _rows(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".csv":
        return [row for _, row in read_table(path)[1]]
    try:
        with open(path, encoding="utf-8-sig") as file:
            return [json.loads(line) for line in file if line.strip()]
    except ValueError as error:
        raise BadValue(path.name, str(path), f"a JSON object in UTF-8 in every line ({error})") from error


def _from_shards(folder: Path, shards: Sequence[PurePosixPath], split: str, streaming: bool) -> Any:
    kinds = sorted({path.suffix.lower() for path in shards})
    if len(kinds) > 1:
        raise BadValue("data", str(folder), f"files of one kind, not {' and '.join(kinds)}")
    by_split: dict[str | None, list[str]] = {}
    for path in sorted(shards):
        by_split.setdefault(_split_of(path), []).append(str(folder / path))
    if None in by_split and len(by_split) > 1:
        raise BadValue(
            "data",
            str(folder),
            f"files whose names all name a split, or none; {Path(by_split[None][0]).name} does not, and others do",
        )
    wanted = next(iter(by_split)) if len(by_split) == 1 else _chosen({name for name in by_split if name}, split)
    if len(by_split) > 1:
        say(f"data: {len(by_split[wanted])} of {len(shards)} files in {folder.name}, those of split {wanted}")
    try:
        return load_dataset(
            _SHARDS[kinds[0]], data_files={"train": by_split[wanted]}, split="train", streaming=streaming
        )
    except DatasetGenerationError as error:
        reason = first_line(error.__cause__ or error)
        raise BadValue("data", str(folder), f"files that can be read ({reason})") from error


def _split_of(path: PurePosixPath) -> str | None:
    """The split that a word of the file name, or the name of a folder, names; None if there is none, or two."""
    words = [*path.parts[:-1], *re.split(r"[\W_]+", path.stem)]
    found = {_SPLITS[word.lower()] for word in words if word.lower() in _SPLITS}
    return next(iter(found)) if len(found) == 1 else None


def _chosen(splits: set[str], split: str) -> str:
    """The wanted split, or the only one that exists."""
    wanted = _SPLITS.get(split, split)
    if wanted in splits:
        return wanted
    if len(splits) > 1:
        raise BadValue("split", split, f"one of {', '.join(sorted(splits))}")
    return next(iter(splits))


def _from_csv(folder: Path, label_column: str | None) -> Dataset:
    column = None if label_column == NO_LABELS else label_column or "label"
    columns, rows = read_table(folder / LABELS_NAME, "file", *(["label"] if label_column is None else []))
    if column is not None and column not in columns:
        raise no_such_column(column, columns)
    files, labels = [], []
    for where, row in rows:
        path = (folder / (row["file"] or "")).resolve()
        if not row["file"] or not path.is_relative_to(folder.resolve()):
            raise BadValue(where, row["file"], "a file inside the folder")
        if not path.is_file():
            raise FileNotFoundError(f"{where}: there is no {row['file']} in {folder}")
        label = row[column] if column else None
        try:
            labels.append(int(label) if label else -1)
        except ValueError as error:
            raise BadValue(where, label, "a whole number, or nothing") from error
        files.append(str(path))
    return Dataset.from_dict(
        {"image": files, "label": labels}, Features({"image": ImageFeature(), "label": Value("int64")})
    )
