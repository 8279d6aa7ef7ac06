"""Stop a run after the current step, with a checkpoint, on SIGTERM, SIGINT or the end of its launcher."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import psutil


SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A terminal signals all processes, and a launcher passes the signal on. A second signal within so many seconds counts
# as the same one.
_SAME = 2.0
_LAUNCHERS = ("accelerate", "torchrun", "torch.distributed")


class Interruption:
    """Inside `with Interruption() as interruption:` a signal sets `interruption.reason` instead of ending the process.

    A second SIGINT ends the process at once. Outside the main thread, signals keep their handlers. `reason` is also
    set when the launcher of this process has ended; otherwise the process would run on unnoticed.
    """

    def __init__(self) -> None:
        self._signal: str | None = None
        self._since = 0.0
        self._former: dict[int, Any] = {}
        self._launcher = launcher()
        self._parent = os.getppid()

    @property
    def reason(self) -> str | None:
        """Why the run must stop, in words; None if it need not."""
        if self._signal is None and self._launcher is not None and os.getppid() != self._parent:
            return "the end of its launcher"
        return self._signal

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, former in self._former.items():
            signal.signal(number, former)
        self._former.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal is None:
            self._signal, self._since = signal.Signals(number).name, time.monotonic()
            # Not print(): the signal may have interrupted a print().
            os.write(2, f"\n{self._signal}: finishing the step and writing a checkpoint\n".encode())
        elif number == signal.SIGINT and time.monotonic() - self._since > _SAME:
            raise KeyboardInterrupt


def leave_signals_to_the_parent(worker: int) -> None:
    """`worker_init_fn` of a DataLoader: workers ignore a signal to all processes of a job, so that the step finishes.

    A worker still ends when its parent terminates it, or has ended.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS lacks it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def launcher() -> psutil.Process | None:
    """The `accelerate launch` or `torchrun` process that started this one; None if there is none."""
    try:
        parent = psutil.Process().parent()
        words = [] if parent is None else parent.cmdline()
    except psutil.Error:
        return None
    # The words after the script's name are the script's own arguments.
    names = [os.path.basename(word) for word in words[:3]]
    return parent if any(name.startswith(_LAUNCHERS) for name in names) else None
