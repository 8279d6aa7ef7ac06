"""Files that are written whole or not at all, and JSON that is read within bounds."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import BadValue


LARGEST_JSON = 1 << 20
_DEEPEST_JSON = 64


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to; it takes the place of `path` only if nothing was raised."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp makes it private
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder beside `path` to fill; it takes the place of `path` only if nothing was raised."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as name:
        filled, old = Path(name, "new"), Path(name, "old")
        filled.mkdir()
        yield filled
        if path.exists():
            path.rename(old)
        filled.rename(path)


@contextmanager
def replacing_together(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder to write files to; they take their places in `folder` only if nothing was raised.

    They move in the order of their names' lengths, so that `model.onnx` is there before the record of it,
    `model.onnx.json`; nothing that was there before is lost if writing fails.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=folder) as staging:
        yield Path(staging)
        for path in sorted(Path(staging).iterdir(), key=lambda path: len(path.name)):
            os.replace(path, folder / path.name)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 text file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write indented JSON, whole or not at all. NaN and infinity are refused, as JSON has neither."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike[str], largest: int = LARGEST_JSON) -> Any:
    """Read a JSON file of at most `largest` bytes and 64 levels.

    Raises FileNotFoundError, or ValueError that names the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path.name} in {path.parent}")
    if path.stat().st_size > largest:
        raise BadValue(path.name, f"{path.stat().st_size} bytes", f"a JSON file of at most {largest} bytes")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadValue(path.name, str(error), f"{path} is not valid JSON") from error
    if not _is_flatter(value, _DEEPEST_JSON):
        raise BadValue(path.name, "deeply nested", f"a JSON file of at most {_DEEPEST_JSON} levels")
    return value


def _is_flatter(value: Any, most: int) -> bool:
    """Whether lists and objects are nested in at most so many levels."""
    level = [value]
    for _ in range(most + 1):
        parts = [part.values() if isinstance(part, dict) else part for part in level if isinstance(part, (dict, list))]
        level = [item for part in parts for item in part]
        if not level:
            return True
    return False
