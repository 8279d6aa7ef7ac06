"""Output folders: they are made before any work, and one run at a time writes there."""

from __future__ import annotations

import os
import platform
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from ..errors import BadValue, need
from ..files import making_folder
from .processes import known_processes


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_NAME = ".lock"
_CLOCK_TOLERANCE = 2.0  # seconds between the clocks of processes and of files
_held: set[int] = set()  # open lock files of this process


def output_folder(path: str | os.PathLike[str]) -> Path:
    """The folder of a program's only file, which is written to without a lock, and made only then.

    Raises OSError where nothing can be written to it, and RuntimeError where the processes of a launch do not know
    each other.
    """
    known_processes()
    folder = Path(path)
    with making_folder(folder), tempfile.TemporaryFile(dir=folder):
        return folder


@contextmanager
def only_run_in(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Inside the block, no other run writes to `folder`, the `Path` of which it yields; it is made if needed.

    All processes of a launch enter the block together.

    Raises ValueError, in all of them, where another thread, process or launch is in the block, RuntimeError where the
    processes of a launch do not know each other, and OSError where nothing can be written to the folder. The lock ends
    with its process, however the process ends.
    """
    state, lock, holder = known_processes(), None, ""
    with making_folder(folder) if state.is_main_process else nullcontext():
        if state.is_main_process:
            lock = _Lock(Path(folder))
            holder = lock.holder
        if state.num_processes > 1:
            from accelerate.utils import gather_object

            holder = gather_object([holder])[0]
        if holder:
            raise BadValue("output_dir", str(folder), f"a folder that no other run is using; {holder} is using it")
        try:
            yield Path(folder)
        finally:
            if lock is not None:
                lock.release()


class _Lock:
    """The locked file `.lock` in a folder, whose text names its holder.

    `holder` is that name where another run holds the lock, and "" where this object does.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK_NAME
        while True:
            self.handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            self.holder = _lock(self.handle)
            if not self.holder and self._is_at_path():
                break
            os.close(self.handle)
            if self.holder:
                return
            # The former holder removed the file between the two calls: lock the new one.
        _held.add(self.handle)
        os.ftruncate(self.handle, 0)
        os.pwrite(self.handle, f"process {os.getpid()} on {platform.node()}".encode(), 0)

    def release(self) -> None:
        """Remove the file."""
        _held.discard(self.handle)
        os.ftruncate(self.handle, 0)
        with suppress(OSError):  # Windows does not remove open files
            self.path.unlink()
        os.close(self.handle)

    def _is_at_path(self) -> bool:
        with suppress(OSError):
            return os.path.samestat(os.fstat(self.handle), os.stat(self.path))
        return False


def _lock(handle: int) -> str:
    """Lock an open file; returns "" or the name of the holder."""
    named = os.read(handle, 500).decode(errors="replace")
    if fcntl is not None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return ""
        except BlockingIOError:
            return named or "another process"
        except OSError:  # a file system without locks
            pass
    # Without locks of the system, the holder is a process that runs, and ran when the file was written.
    number = re.fullmatch(rf"process (\d+) on {re.escape(platform.node())}", named)
    if number is None:
        return named
    need("train", "a lock on this file system", "psutil")
    import psutil

    try:
        began = psutil.Process(int(number[1])).create_time()
    except psutil.Error:
        return ""
    return named if began < os.fstat(handle).st_mtime + _CLOCK_TOLERANCE else ""


def _close_in_child() -> None:
    """A forked child, such as a worker that loads data, must not keep the lock when its parent ends."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
