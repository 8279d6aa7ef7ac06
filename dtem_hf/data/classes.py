"""Map the labels of a data set to the classes of a model, by name if both have names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.compute as pc
from datasets import ClassLabel, Dataset

from ..errors import BadValue
from ..programs.processes import say
from .folders import image_name


_WNIDS = Path(__file__).with_name("imagenet_wnids.txt")
_NO_NAME = re.compile(r"(LABEL_)?\d+")
_SHOWN = 3


class ClassMap(NamedTuple):
    """The model's class for every label (None: a label is the class number), and how they were matched, in words."""

    ids: list[int] | None
    how: str

    def class_of(self, label: int) -> int:
        """The class of a label; -1 for none."""
        return label if self.ids is None or label < 0 else self.ids[label]


AS_NUMBERS = ClassMap(None, "class numbers")


def match_labels(images: Any, config: Any, needed: bool = True) -> ClassMap:
    """Match the labels of a data set (streamed or not) with the classes of a model config.

    Labels without names are the model's class numbers. Labels with names are matched by name, by ImageNet's wnids, or,
    with a message, by order if there are as many names as classes. Raises ValueError if the names do not fit, or a
    number is out of range. With `needed` False, names that do not fit only leave the labels out, with a message.
    """
    kind = (images.features or {}).get("label")
    if not isinstance(kind, ClassLabel):
        if isinstance(images, Dataset):
            check_labels(images, config.num_labels)
        return AS_NUMBERS
    try:
        found = match_classes(kind.names, config.id2label, config.label2id)
    except BadValue as error:
        if needed:
            raise
        say(f"labels are not used: {error}")
        return ClassMap([-1] * len(kind.names), "none")
    if found.how == "order":
        say(
            f"labels: the {len(kind.names)} classes of the data ({_some(kind.names)}) are matched with the model's "
            f"({_some(list(config.id2label.values()))}) by their order, as their names differ"
        )
    return found


def match_classes(
    names: Sequence[str], id2label: Mapping[int, str], label2id: Mapping[str, int] | None = None
) -> ClassMap:
    """The model's class for every name. Raises ValueError, with names of data and model, if they do not fit."""
    count = len(id2label)
    if all(name.isdecimal() and int(name) < count for name in names):
        return ClassMap([int(name) for name in names], "class numbers")
    known = _ids_by_name(id2label, label2id or {})
    wnids = _wnids() if _is_imagenet(id2label) else {}
    found = [_id_of(name, known, wnids) for name in names]
    # Some names may be spelled differently, or mean two classes: the other names confirm that the order is the same.
    if len(names) == count and all(i in (None, -1, place) for place, i in enumerate(found)):
        return ClassMap(list(range(count)), "names" if any(i == place for place, i in enumerate(found)) else "order")
    unknown = [name for name, i in zip(names, found, strict=True) if i is None]
    if unknown:
        raise BadValue(
            "data",
            unknown[:_SHOWN],
            f"class names of the model, which has {count} ({_some(list(id2label.values()))}); {len(unknown)} of "
            f"{len(names)} names in the data are unknown. Rename the classes, write a labels.csv with class numbers, "
            "or use no labels with --label_column none",
        )
    unclear = [name for name, i in zip(names, found, strict=True) if i == -1]
    if unclear:
        say(f"labels: {', '.join(unclear)} are not used, as the model has several classes of that name")
    return ClassMap([i for i in found if i is not None], "names")


def check_labels(images: Dataset, num_labels: int) -> None:
    """Raise ValueError that names the first image whose label is not below `num_labels`; -1 means no label."""
    labels = images.select_columns(["label"]).with_format("arrow")[:]["label"]
    wrong = pc.or_(pc.greater_equal(labels, num_labels), pc.less(labels, -1))
    index = pc.index(wrong, True).as_py()
    if index >= 0:
        raise bad_label(labels[index].as_py(), index, image_name(images, index), num_labels)


def bad_label(label: int, index: int, name: str, num_labels: int) -> BadValue:
    """The error for a label that is no class of the model."""
    expected = f"image {index} needs a number below the model's {num_labels} classes"
    return BadValue("label", label, expected if name == str(index) else f"{expected} ({name})")


def _ids_by_name(id2label: Mapping[int, str], label2id: Mapping[str, int]) -> dict[str, set[int]]:
    """Class ids by "=" and the exact name, by the plain form of the name, and by each synonym between commas."""
    known: dict[str, set[int]] = {}
    for i, label in [*id2label.items(), *((i, label) for label, i in label2id.items())]:
        if not _NO_NAME.fullmatch(label):
            for name in {f"={label}", *map(_plain, (label, *label.split(",")))}:
                known.setdefault(name, set()).add(int(i))
    return known


def _id_of(name: str, known: Mapping[str, set[int]], wnids: Mapping[str, int]) -> int | None:
    """The class of a name; -1 if several classes have it, None if no class has it."""
    found = [known[key] for key in (f"={name}", *map(_plain, (name, *name.split(",")))) if key in known]
    for ids in found:
        if len(ids) == 1:
            return next(iter(ids))
    wnid = re.match(r"n\d{8}", name)
    return wnids.get(wnid[0]) if wnid else -1 if found else None


def _is_imagenet(id2label: Mapping[int, str]) -> bool:
    """Whether a model has ImageNet-1k's classes: 1,000 of them, the first two named tench and goldfish or nameless."""
    first = [id2label.get(i, "") for i in range(2)]
    named = all(word in label.lower() for word, label in zip(("tench", "goldfish"), first, strict=True))
    return len(id2label) == 1000 and (named or all(_NO_NAME.fullmatch(label) for label in first))


def _wnids() -> dict[str, int]:
    return {wnid: i for i, wnid in enumerate(_WNIDS.read_text(encoding="ascii").split())}


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", " ", name).strip().casefold()


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
