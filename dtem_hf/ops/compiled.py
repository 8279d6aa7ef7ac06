"""The C beside this file, compiled once by the machine's own compiler (`cc`, or $CC).

It is kept in the user's cache folder, as Triton keeps its kernels. Where there is no compiler, and with
DTEM_HF_NATIVE=0 in the environment, there is no library, and all that would call it runs by tensor operations, which
are the reference.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .switches import is_on


_FOLDER = Path(__file__).parent
_SOURCES = tuple(_FOLDER / name for name in ("native.c", "fused_layer.c"))
_HEADERS = (_FOLDER / "native.h",)
_FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
# Vectors as wide as the processor has them, where the compiler knows it.
_TARGETS = (("-march=native",), ())


@cache
def library() -> Any:
    """The compiled C, or None where it cannot be had. Compiled at the first call, and loaded once for a process.

    Warns where there is a compiler and it fails, and where $CC names none.
    """
    if not is_on("DTEM_HF_NATIVE") or sys.platform == "win32":
        return None
    named = os.environ.get("CC")
    try:
        compiler = shlex.split(named or "cc")
    except ValueError:  # a quotation that does not end
        compiler = []
    if not compiler or shutil.which(compiler[0]) is None:
        if named:
            _warn(f"CC={named!r} names no program that is there")
        return None
    failure: Exception | None = None
    for target in _TARGETS:
        try:
            return _load(compiler, target)
        except (OSError, subprocess.SubprocessError) as error:
            failure = error
    said = getattr(failure, "stderr", None) or str(failure).encode()
    reason = (said.decode(errors="replace").strip().splitlines() or ["no reason given"])[0]
    _warn(f"{shlex.join(compiler)} could not compile it: {reason}")
    return None


def _warn(reason: str) -> None:
    warnings.warn(
        f"What makes merged models faster on this CPU is not there ({reason}); they run by tensor operations. Name a "
        "compiler in CC, or set DTEM_HF_NATIVE=0 to do without.",
        stacklevel=3,
    )


def library_version() -> str:
    """Which build of the C runs: a part of the hash of its source, compiler and processor; "none" without one."""
    loaded = library()
    return "none" if loaded is None else Path(loaded._name).stem.split("-")[1][:8]


def _load(compiler: list[str], target: tuple[str, ...]) -> ctypes.CDLL:
    # What the compiler says of itself and of the processor: caches lie in homes that different machines share.
    asked = [*compiler, *target, "-dM", "-E", "-x", "c", os.devnull]
    macros = subprocess.run(asked, capture_output=True, check=True, timeout=30).stdout
    sources = [path.read_bytes() for path in (*_SOURCES, *_HEADERS)]
    digest = hashlib.sha256(b"\0".join([*sources, macros, repr((_FLAGS, target)).encode()])).hexdigest()
    name, folder = f"native-{digest[:32]}", _cache_folder()
    if folder is not None:
        kept = _kept(folder, name)
        if kept is None:
            with TemporaryDirectory(dir=folder) as temporary:
                built = _compile(compiler, target, Path(temporary, "built.so"))
                kept = folder / f"{name}-{_content(built)}.so"
                os.replace(built, kept)
        try:
            return ctypes.CDLL(str(kept))
        except OSError:  # nothing may be run from that folder
            pass
    with TemporaryDirectory() as temporary:  # a loaded library no longer needs its file
        built = _compile(compiler, target, Path(temporary, f"{name}-new.so"))
        return ctypes.CDLL(str(built))


def _kept(folder: Path, name: str) -> Path | None:
    """The library of a name that is in the folder, as it was put there: half of one would crash the process."""
    for path in sorted(folder.glob(f"{name}-*.so")):
        try:
            if path.stem.endswith(f"-{_content(path)}"):
                return path
            path.unlink()
        except OSError:  # somebody else was quicker
            continue
    return None


def _content(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _compile(compiler: Sequence[str], target: Sequence[str], built: Path) -> Path:
    command = [*compiler, *_FLAGS, *target, *map(str, _SOURCES), "-o", str(built), "-lm"]
    subprocess.run(command, capture_output=True, check=True, timeout=120)
    return built


def _cache_folder() -> Path | None:
    """A folder of the user's own, which nobody else can put a library into; None where there is none."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    if not os.path.isabs(base):  # nobody has a home, or it is not to be told
        return None
    folder = Path(base) / "dtem_hf"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError:
        return None
    own = status.st_uid == os.getuid() and not status.st_mode & 0o022
    return folder if own and os.access(folder, os.W_OK) else None
