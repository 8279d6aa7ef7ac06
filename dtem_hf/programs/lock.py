"""Output folders: a program checks them before its work, and only one run at a time writes to one."""

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
_CLOCK_TOLERANCE = 2.0  # seconds by which the clocks of processes and of files may differ
# What a later run resumes from, and where it lies.
_KEPT = {"finished batches": "parts/*.npz", "checkpoints": "checkpoints/step-*"}
_held: set[int] = set()  # open lock files of this process


def output_folder(path: str | os.PathLike[str]) -> Path:
    """Check the output folder of a program that writes one file, without a lock. The folder is not made yet.

    Raises OSError if it is not writable, and RuntimeError if the processes of a launch do not know each other.
    """
    known_processes()
    folder = Path(path)
    with making_folder(folder), tempfile.TemporaryFile(dir=folder):
        return folder


@contextmanager
def only_run_in(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Lock an output folder, so that no other run writes to it inside the block; yields its `Path`.

    The folder is made if needed. All processes of a launch enter the block together. The lock ends with its process,
    even if the process is killed. Raises ValueError, in all processes, if another thread, process or launch has the
    lock, RuntimeError if the processes of a launch do not know each other, and OSError if the folder is not writable.
    A KeyboardInterrupt gets a message that says what was kept and how to go on.
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
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(*error.args or [_how_to_go_on(Path(folder))]) from error
        finally:
            if lock is not None:
                lock.release()


def _how_to_go_on(folder: Path) -> str:
    """What an interrupted run has kept in its folder, and what the same command does with it."""
    for what, pattern in _KEPT.items():
        if count := len(list(folder.glob(pattern))):
            return f"{folder} keeps {count} {what}, and the same command resumes from there"
    return f"no result was written to {folder}, and the same command starts over"


class _Lock:
    """The locked file `.lock` in a folder; its text names the process that holds the lock.

    `holder` is this text if another run holds the lock, and "" if this object does.
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
    """Lock an open file. Returns "", or the name of the process that holds the lock."""
    named = os.read(handle, 500).decode(errors="replace")
    if fcntl is not None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return ""
        except BlockingIOError:
            return named or "another process"
        except OSError:  # a file system without locks
            pass
    # Without file locks, the lock is held if the named process still runs and started before the file was written.
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
    """Release inherited locks in a forked child, such as a data worker, which may live longer than its parent."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
