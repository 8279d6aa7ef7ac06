"""Write files and folders atomically (whole or not at all), and read regular files of bounded size."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import BadValue


LARGEST_JSON = 1 << 20
_DEEPEST_JSON = 64
_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# The errors that failed writes raise; torch raises RuntimeError.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{8}\.tmp")


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to. It replaces `path` if the block raises nothing."""
    path = Path(path)
    temporary = _temporary(path)
    with _naming_a_full_disk(path), making_folder(path.parent):
        try:
            # os.open applies the process's umask; Python cannot read the umask without setting it.
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder beside `path` to fill. It replaces `path` if the block raises nothing."""
    path = Path(path)
    with _staging(path) as staging:
        filled = staging / "new"
        filled.mkdir()
        yield filled
        if path.exists():
            path.rename(staging / "old")
        filled.rename(path)


@contextmanager
def replacing_together(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder to write files to. If the block raises nothing, the files move to `folder`.

    Shorter names move first, so that `model.onnx` arrives before its record `model.onnx.json`.
    """
    folder = Path(folder)
    with _staging(folder / "files", folder) as staging:
        yield staging
        for path in sorted(staging.iterdir(), key=lambda path: len(path.name)):
            os.replace(path, folder / path.name)


@contextmanager
def making_folder(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Make a folder and its parents; after the block, remove the new folders that are still empty."""
    path = Path(folder)
    made = [each for each in (path, *path.parents) if not each.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for each in made:
            with suppress(OSError):
                each.rmdir()


def check_folder(option: str, folder: str | os.PathLike[str]) -> None:
    """Raise ValueError naming `option` if the path of the folder or of a parent is a file or a broken link."""
    path = Path(folder)
    there = next((each for each in (path, *path.parents) if os.path.lexists(each)), path)
    if not there.is_dir():
        what = "a file" if there.exists() else "a link to nothing"
        raise BadValue(option, str(folder), f"a folder; {there} is {what}")


def check_file(option: str, file: str) -> None:
    """Raise ValueError naming `option` if the path of the file is a folder, or one of its parents is a file."""
    check_folder(option, Path(file).parent)
    if Path(file).is_dir():
        raise BadValue(option, file, "the path of a file; this is a folder")


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Remove the temporary files and folders that a killed process left in a folder.

    Call it only while no other process writes to the folder. If the process was killed while it replaced a folder,
    the old folder is moved back.
    """
    for path in Path(folder).glob(".*.tmp"):
        if found := _TEMPORARY.fullmatch(path.name):
            _discard(path, path.with_name(found[1]))


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


@contextmanager
def _staging(path: Path, named: Path | None = None) -> Iterator[Path]:
    """A temporary folder beside `path`; an error about a full disk names `named`, or else `path`."""
    staging = _temporary(path)
    with _naming_a_full_disk(named or path), making_folder(path.parent):
        try:
            staging.mkdir()
            yield staging
        finally:
            _discard(staging, path)


@contextmanager
def _naming_a_full_disk(path: Path) -> Iterator[None]:
    """Turn the error of a full disk inside the block into an OSError that names `path`."""
    try:
        yield
    except WRITE_ERRORS as error:
        code, named = full_disk(error), getattr(error, "filename", None)
        if code and (named is None or _TEMPORARY.fullmatch(Path(named).name)):
            raise OSError(code, os.strerror(code), str(path)) from error
        raise


def full_disk(error: Exception) -> int | None:
    """The errno of an error caused by a full disk or quota, else None.

    Errors of torch and safetensors hold it only in the text of their message.
    """
    if isinstance(error, OSError):
        return error.errno if error.errno in _DISK_IS_FULL else None
    return next((code for code in _DISK_IS_FULL if os.strerror(code) in str(error)), None)


def _discard(temporary: Path, path: Path) -> None:
    """Remove a temporary file or folder. If it holds the only version of `path`, move that back first."""
    if (temporary / "old").exists() and not path.exists():
        (temporary / "old").rename(path)
    if temporary.is_dir() and not temporary.is_symlink():
        shutil.rmtree(temporary, ignore_errors=True)
    else:
        temporary.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file atomically."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 text file atomically."""
    write_bytes(path, text.encode())


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write indented JSON atomically. Raises ValueError for NaN and infinity, which JSON lacks."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_bytes(path: str | os.PathLike[str], largest: int, links: bool = True) -> bytes:
    """Read a regular file of at most `largest` bytes; `links` allows symbolic links.

    Raises FileNotFoundError, or BadValue for a pipe, a device, a folder, a link that is not allowed, or a larger file.
    """
    path = Path(path)
    try:
        facts = os.stat(path, follow_symlinks=links)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"there is no {path.name} in {path.parent}") from None
    if stat.S_ISLNK(facts.st_mode):
        raise BadValue(path.name, str(path), "a file in the folder itself, not a symbolic link")
    if not stat.S_ISREG(facts.st_mode):
        raise BadValue(path.name, str(path), "a regular file")
    size = facts.st_size
    if size <= largest:
        # Another file may replace it after the check: a pipe must not block, and no more than `size` bytes are read.
        flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
        flags |= 0 if links else getattr(os, "O_NOFOLLOW", 0)
        with open(os.open(path, flags), "rb") as file:
            content = file.read(size + 1)
        if len(content) <= size:
            return content
    raise BadValue(path.name, f"{size} bytes", f"a file of at most {largest} bytes")


def read_text(path: str | os.PathLike[str], largest: int, links: bool = True) -> str:
    """Read a UTF-8 text file as `read_bytes` does; line ends become "\\n". Raises ValueError if it is not UTF-8."""
    return read_bytes(path, largest, links).decode().replace("\r\n", "\n")


def read_json(path: str | os.PathLike[str], largest: int = LARGEST_JSON, links: bool = True) -> Any:
    """Read a JSON file of at most `largest` bytes and 64 levels; errors are those of `read_bytes`, and BadValue."""
    content = read_bytes(path, largest, links)
    name = Path(path).name
    try:
        value = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise BadValue(name, str(error), f"{path} is not valid JSON") from error
    level = [value]
    for _ in range(_DEEPEST_JSON + 1):
        parts = [part.values() if isinstance(part, dict) else part for part in level if isinstance(part, (dict, list))]
        level = [item for part in parts for item in part]
        if not level:
            return value
    raise BadValue(name, "deeply nested", f"a JSON file of at most {_DEEPEST_JSON} levels")


def check_is_there(name: str) -> None:
    """Raise FileNotFoundError if a name is the path of a missing folder, so that the Hub is not asked for it."""
    is_path = name.startswith(("/", ".", "~")) or "\\" in name or name.count("/") > 1
    if (is_path or ("/" in name and Path(name).parent.is_dir())) and not os.path.exists(name):
        raise FileNotFoundError(f"there is no folder {name}")
