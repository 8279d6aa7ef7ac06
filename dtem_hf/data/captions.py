"""Caption files: COCO's annotation and result formats, the Karpathy splits, and Flickr8k's table."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import BadValue
from ..files import read_json, write_json
from .folders import read_table


# COCO's largest caption file has 92 MB, the Karpathy splits 144 MB.
_LARGEST = 1 << 29


@dataclass
class CaptionedImage:
    """An image's file name and its reference captions."""

    file_name: str
    captions: list[str] = field(default_factory=list)


def read_annotations(path: str | os.PathLike[str], split: str | None = None) -> dict[int, CaptionedImage]:
    """Images by id, in the file's order, from COCO's annotations, Karpathy's `dataset_coco.json`, or a table.

    A table has the columns `image` and `caption`, like Flickr8k's `captions.txt`; its images are numbered. `split`
    chooses Karpathy's splits (train, restval, val, test, or several as in train+restval); the other formats have none.
    Raises FileNotFoundError, or ValueError that names the entry and what would be right.
    """
    name = Path(path).name
    if Path(path).suffix in (".txt", ".csv"):
        if split is not None:
            raise BadValue("split", split, f"no split: {name} is a table, only Karpathy's JSON has splits")
        images = _read_table(Path(path))
    else:
        images = _read_json(path, name, split)
    if not images:
        raise BadValue(name, 0, "at least one image with a caption")
    return images


def _read_json(path: str | os.PathLike[str], name: str, split: str | None) -> dict[int, CaptionedImage]:
    content = read_json(path, _LARGEST)
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise BadValue(name, type(content).__name__, "an object with a list 'images', as COCO and Karpathy write it")
    if isinstance(content.get("annotations"), list):
        if split is not None:
            raise BadValue("split", split, f"no split: {name} is in COCO's format, only Karpathy's JSON has splits")
        return _read_coco(content, name)
    return _read_karpathy(content["images"], name, split)


def read_predictions(path: str | os.PathLike[str]) -> dict[int, str]:
    """One caption by COCO id, from COCO's result format: a list of {"image_id": int, "caption": str}.

    Raises FileNotFoundError, or ValueError that names the entry, also for two captions of one image.
    """
    name = Path(path).name
    content = read_json(path, _LARGEST)
    if not isinstance(content, list) or not content:
        raise BadValue(name, type(content).__name__, 'a list of {"image_id": …, "caption": …}, at least one')
    captions: dict[int, str] = {}
    for i, entry in enumerate(content):
        where = f"{name}[{i}]"
        image_id = _value(entry, where, "image_id", int)
        if image_id in captions:
            raise BadValue(f"{where}.image_id", image_id, "one caption per image; this image has two")
        captions[image_id] = _value(entry, where, "caption", str)
    return captions


def write_predictions(path: str | os.PathLike[str], captions: Mapping[int, str]) -> None:
    """Write captions in COCO's result format, atomically."""
    write_json(path, [{"image_id": image_id, "caption": caption} for image_id, caption in captions.items()])


def has_splits(path: str | os.PathLike[str]) -> bool:
    """Whether a file is in Karpathy's format, in which every image names its split."""
    if Path(path).suffix in (".txt", ".csv"):
        return False
    content = read_json(path, _LARGEST)
    return isinstance(content, dict) and "annotations" not in content


def _read_table(path: Path) -> dict[int, CaptionedImage]:
    images: dict[str, CaptionedImage] = {}
    for where, row in read_table(path, "image", "caption")[1]:
        if not row["image"] or not row["caption"]:
            raise BadValue(where, row, "an image and a caption")
        images.setdefault(row["image"], CaptionedImage(row["image"])).captions.append(row["caption"])
    return dict(enumerate(images.values()))


def _read_coco(content: dict[str, Any], name: str) -> dict[int, CaptionedImage]:
    images = {}
    for i, entry in enumerate(content["images"]):
        where = f"{name}.images[{i}]"
        images[_value(entry, where, "id", int)] = CaptionedImage(_value(entry, where, "file_name", str, ""))
    for i, entry in enumerate(content["annotations"]):
        where = f"{name}.annotations[{i}]"
        image_id = _value(entry, where, "image_id", int)
        if image_id not in images:
            raise BadValue(f"{where}.image_id", image_id, "the id of one of the images")
        images[image_id].captions.append(_value(entry, where, "caption", str))
    return {image_id: image for image_id, image in images.items() if image.captions}


def _read_karpathy(entries: list[Any], name: str, split: str | None) -> dict[int, CaptionedImage]:
    splits = sorted({str(entry.get("split")) for entry in entries if isinstance(entry, dict)})
    wanted = set() if split is None else set(split.split("+"))
    if not wanted or not wanted <= set(splits):
        raise BadValue("split", split, f"one of the splits in {name}: {', '.join(splits)}, or several joined by +")
    images = {}
    for i, entry in enumerate(entries):
        where = f"{name}.images[{i}]"
        if not isinstance(entry, dict) or entry.get("split") not in wanted:
            continue
        sentences = _value(entry, where, "sentences", list)
        captions = [_value(sentence, f"{where}.sentences[{j}]", "raw", str) for j, sentence in enumerate(sentences)]
        # Karpathy's files for Flickr images have no COCO id, only an `imgid`.
        image_id = _value(entry, where, "cocoid" if "cocoid" in entry else "imgid", int)
        folder = _value(entry, where, "filepath", str, "")
        images[image_id] = CaptionedImage(os.path.join(folder, _value(entry, where, "filename", str)), captions)
    return images


def _value(entry: Any, where: str, name: str, kind: type, default: Any = None) -> Any:
    if not isinstance(entry, dict):
        raise BadValue(where, entry, "an object")
    value = entry.get(name, default)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise BadValue(f"{where}.{name}", value, {int: "a whole number", str: "text", list: "a list"}[kind])
    return value
