"""Checked JSON records of training and evaluation for a card, and text that is safe to publish.

Names in a record come from configs and command lines of any origin, and a record holds paths of the machine that made
it.
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
# Hub tokens and paths of a machine: a record may hold them, a published card must not.
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
    """An entry of a record, checked to be of a type; if it is missing or null, `default`, if given."""
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
    """Read a record's file as `read_json` does. Raises FileNotFoundError, or ValueError if it is no JSON object."""
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
    """Whether a name is valid for a Hub repository."""
    try:
        validate_repo_id(name or "")
    except HFValidationError:
        return False
    return True


def without_private(value: Any) -> Any:
    """A record's JSON without Hub tokens, and with the folders of paths replaced by "…"."""
    if isinstance(value, dict):
        return {without_private(key): without_private(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_private(item) for item in value]
    if isinstance(value, str):
        for pattern, replacement in _PRIVATE:
            value = pattern.sub(replacement, value)
    return value


def clean(value: Any) -> str:
    """Text on one line of printable characters, without tokens and paths, shortened if it is very long."""
    text = "".join(character if character.isprintable() else " " for character in str(value))
    text = " ".join(without_private(text).split())
    return text if len(text) <= _LONGEST_TEXT else text[:_LONGEST_TEXT] + "…"


def as_code(value: Any) -> str:
    """Text as a Markdown code span; in it, only the backtick is special (and bars, inside a table)."""
    return f"`{as_line(value) or ' '}`"


def as_line(value: Any) -> str:
    """Text as a line inside a code block; it has no backtick that could end the block."""
    return clean(value).replace("`", "'")


def as_text(value: Any) -> str:
    """Text for a Markdown paragraph, with its special characters escaped."""
    return re.sub(r"([\\`*_{}\[\]()<>#|~&$@:!])", r"\\\1", clean(value))
