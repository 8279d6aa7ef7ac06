"""The C beside this file, compiled once by the machine's own compiler (`cc`, or $CC).

It is kept in the user's cache folder, as Triton keeps its kernels. Where there is no compiler, and with
DTEM_HF_NATIVE=0 in the environment, there is no library, and all that would call it runs by tensor operations, which
are the reference.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any


_FOLDER = Path(__file__).parent
_SOURCES = tuple(_FOLDER / name for name in ("native.c", "fused_layer.c"))
_HEADERS = (_FOLDER / "native.h",)
_FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
# Vectors as wide as the processor has them, where the compiler knows it.
_TARGETS = (("-march=native",), ())


@cache
def library() -> Any:
    """The compiled C, or None where it cannot be had. Compiled at the first call, and loaded once for a process.

    Warns where there is a compiler and it fails.
    """
    if os.environ.get("DTEM_HF_NATIVE") == "0" or sys.platform == "win32":
        return None
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if compiler is None:
        return None
    failure: Exception | None = None
    for target in _TARGETS:
        try:
            return _load(compiler, target)
        except (OSError, subprocess.SubprocessError) as error:
            failure = error
    said = getattr(failure, "stderr", None) or str(failure).encode()
    reason = (said.decode(errors="replace").strip().splitlines() or ["no reason given"])[0]
    warnings.warn(
        f"{compiler} could not compile what makes merged models faster on this CPU ({reason}); they run by tensor "
        "operations. Name another compiler in CC, or set DTEM_HF_NATIVE=0 to do without.",
        stacklevel=2,
    )
    return None


def library_version() -> str:
    """Which build of the C runs: a part of the hash of its source, compiler and processor; "none" without one."""
    loaded = library()
    return "none" if loaded is None else Path(loaded._name).stem.removeprefix("native-")[:8]


def _load(compiler: str, target: tuple[str, ...]) -> ctypes.CDLL:
    # What the compiler says of itself and of the processor: caches lie in homes that different machines share.
    asked = [compiler, *target, "-dM", "-E", "-x", "c", os.devnull]
    macros = subprocess.run(asked, capture_output=True, check=True, timeout=30).stdout
    sources = [path.read_bytes() for path in (*_SOURCES, *_HEADERS)]
    digest = hashlib.sha256(b"\0".join([*sources, macros, repr((_FLAGS, target)).encode()])).hexdigest()
    folder = _cache_folder()
    name = f"native-{digest[:32]}.so"
    if folder is not None:
        path = folder / name
        try:
            return ctypes.CDLL(str(path))
        except OSError:  # it is not there yet, or spoilt
            with TemporaryDirectory(dir=folder) as temporary:
                os.replace(_compile(compiler, target, Path(temporary, name)), path)
        try:
            return ctypes.CDLL(str(path))
        except OSError:  # nothing may be run from that folder
            pass
    with TemporaryDirectory() as temporary:  # a loaded library no longer needs its file
        return ctypes.CDLL(str(_compile(compiler, target, Path(temporary, name))))


def _compile(compiler: str, target: tuple[str, ...], built: Path) -> Path:
    command = [compiler, *_FLAGS, *target, *map(str, _SOURCES), "-o", str(built), "-lm"]
    subprocess.run(command, capture_output=True, check=True, timeout=120)
    return built


def _cache_folder() -> Path | None:
    """A folder of the user's own, which nobody else can put a library into; None where there is none."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(base) / "dtem_hf"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError:
        return None
    own = status.st_uid == os.getuid() and not status.st_mode & 0o022
    return folder if own and os.access(folder, os.W_OK) else None
