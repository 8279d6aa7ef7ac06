"""JSON records of training and evaluation as a card needs them: checked, and with text that is safe to publish.

The names in a record come from configs and command lines that anyone may have written, and it names folders of the
machine on which it was made.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ..errors import BadValue
from ..files import read_json


_LONGEST_TEXT = 1000
_LARGEST_NUMBER = 1e18  # records hold smaller numbers, and neither infinity nor NaN
# Hub tokens and folders of a machine, which a record may hold and a published card must not.
_PRIVATE = (
    (re.compile(r"\bhf_[A-Za-z0-9]{16,}"), "hf_…"),
    (re.compile(r"^~?/.*/(?=[^/]+$)"), "…/"),
    (re.compile(r"(?<=['\"])~?/[^'\"]*/(?=[^/'\"]+['\"])"), "…/"),
    (re.compile(r"(?<![\w.:/])~?/(?:[^\s/'\"]+/)+(?=[^\s/'\"])"), "…/"),
    (re.compile(r"(?<!\w)[A-Za-z]:\\(?:[^\s\\'\"]+\\)+"), "…/"),
)
_KINDS: dict[type, tuple[type | tuple[type, ...], str]] = {
    str: (str, "text"),
    int: (int, "a whole number"),
    float: ((int, float), "a number"),
    list: (list, "a list"),
    dict: (dict, "an object"),
}


def entry(record: Mapping[str, Any], where: str, name: str, kind: type, default: Any = MISSING) -> Any:
    """An entry of a record, checked to be of a kind; `default`, if given, where it is absent or null."""
    value = record.get(name)
    if value is None and default is not MISSING:
        return default
    types, expected = _KINDS[kind]
    fits = isinstance(value, types)
    if kind in (int, float):
        fits = fits and not isinstance(value, bool) and abs(value) < _LARGEST_NUMBER  # type: ignore[arg-type]
    if not fits:
        raise BadValue(f"{where}.{name}", value, expected)
    return value


def read_record(path: str | os.PathLike[str], links: bool = True) -> dict[str, Any]:
    """Read a record's file as `read_json` does. Raises FileNotFoundError, or ValueError where it is no JSON object."""
    record = read_json(path, links=links)
    if not isinstance(record, dict):
        raise BadValue(Path(path).name, type(record).__name__, "a JSON object")
    return record


def versions_of(record: Mapping[str, Any], where: str) -> str | None:
    """The versions in a record, on one line."""
    versions = entry(record, where, "versions", dict, {})
    return ", ".join(as_code(f"{name} {value}") for name, value in versions.items()) or None


def data_name_of(record: Mapping[str, Any] | None, where: str) -> str | None:
    """The name of a record's data, on one line."""
    data = entry(record or {}, where, "data", dict, {})
    return clean(entry(data, f"{where}.data", "name", str, "")) or None


def is_repo_id(name: Any) -> bool:
    """Whether a name could be a repository's on the Hub."""
    try:
        validate_repo_id(name or "")
    except HFValidationError:
        return False
    return True


def without_private(value: Any) -> Any:
    """A record's JSON without Hub tokens, and with folders of a machine cut short."""
    if isinstance(value, dict):
        return {without_private(key): without_private(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_private(item) for item in value]
    if isinstance(value, str):
        for pattern, replacement in _PRIVATE:
            value = pattern.sub(replacement, value)
    return value


def clean(value: Any) -> str:
    """Text on one line of printable characters, without what is private."""
    text = "".join(character if character.isprintable() else " " for character in str(value))
    text = " ".join(without_private(text).split())
    return text if len(text) <= _LONGEST_TEXT else text[:_LONGEST_TEXT] + "…"


def as_code(value: Any) -> str:
    """Text as a code span, in which only the backtick is special in Markdown (and bars, inside a table)."""
    return f"`{as_line(value) or ' '}`"


def as_line(value: Any) -> str:
    """Text as a line inside a code block, which cannot end it."""
    return clean(value).replace("`", "'")


def as_text(value: Any) -> str:
    """Text for a Markdown paragraph, with its special characters escaped."""
    return re.sub(r"([\\`*_{}\[\]()<>#|~&$@:!])", r"\\\1", clean(value))
