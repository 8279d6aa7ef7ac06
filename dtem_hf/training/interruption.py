"""A polite end: SIGTERM, SIGINT or a launcher that is gone ends a run behind a step, with a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

import psutil


SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Seconds. A launcher hands on a signal that a terminal may have sent to every process already.
_SAME = 2.0
_LAUNCHERS = ("accelerate", "torchrun", "torch.distributed")


class Interruption:
    """Inside `with Interruption() as interruption:` a signal sets `interruption.reason` instead of ending the process.

    A second SIGINT ends it at once. In a thread that is not the main one, signals are left alone. `reason` is also set
    when the launcher this process was started by is gone, which would otherwise leave it running unseen.
    """

    def __init__(self) -> None:
        self._signal: str | None = None
        self._since = 0.0
        self._former: dict[int, Any] = {}
        self._launcher = launcher()
        self._parent = os.getppid()

    @property
    def reason(self) -> str | None:
        """What asked for the end, in words; None if nothing did."""
        if self._signal is None and self._launcher is not None and os.getppid() != self._parent:
            return "the end of its launcher"
        return self._signal

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        for number, former in self._former.items():
            signal.signal(number, former)
        self._former.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal is None:
            self._signal, self._since = signal.Signals(number).name, time.monotonic()
            # print() may be what was interrupted.
            os.write(2, f"\n{self._signal}: finishing the step and writing a checkpoint\n".encode())
        elif number == signal.SIGINT and time.monotonic() - self._since > _SAME:
            raise KeyboardInterrupt


def leave_signals_to_the_parent(worker: int) -> None:
    """`worker_init_fn` of a DataLoader: whoever signals all processes of a job must not end the workers of a step.

    A worker still ends when its parent says so, or is gone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on a Mac
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_the_parent_says_so, daemon=True).start()


def _end_when_the_parent_says_so() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def launcher() -> psutil.Process | None:
    """The `accelerate launch` or `torchrun` that this process was started by; None if there is none."""
    try:
        parent = psutil.Process().parent()
        words = [] if parent is None else parent.cmdline()
    except psutil.Error:
        return None
    # Behind the script's name come its own arguments.
    names = [os.path.basename(word) for word in words[:3]]
    return parent if any(name.startswith(_LAUNCHERS) for name in names) else None
