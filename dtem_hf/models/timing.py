"""Interleaved timing: each round runs every candidate once, so that other load on the machine affects all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch

from ..errors import BadValue


Run = Callable[[], Any]
# A turn of a run covers at least so many images.
_BLOCK = 8


def synchronize(device: torch.device) -> None:
    """Wait until a device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def time_interleaved(
    runs: Sequence[Run],
    device: torch.device,
    rounds: int = 20,
    warmup: int = 3,
    advance: Callable[[], Any] = lambda: None,
    batch_size: int = _BLOCK,
) -> np.ndarray:
    """Seconds of every run in every round: [rounds, runs]. `warmup` rounds are dropped; see `timed_rounds`."""
    for name, value, low in (("rounds", rounds, 1), ("warmup", warmup, 0)):
        if value < low:
            raise BadValue(name, value, f"{low} or more")
    return np.stack(list(islice(timed_rounds(runs, device, advance, batch_size), warmup, warmup + rounds)))


def timed_rounds(
    runs: Sequence[Run],
    device: torch.device,
    advance: Callable[[], Any] = lambda: None,
    batch_size: int = _BLOCK,
    skipped: Collection[int] = (),
) -> Iterator[np.ndarray]:
    """Yield the seconds of every run, [runs], round after round without end.

    With a batch of fewer than 8 images, a turn calls the run until it has seen 8: a single short call would find cold
    caches. The seconds are those of one call. `advance` is called after every turn, for a progress bar. Runs whose
    index is in `skipped` are left out and have NaN seconds; `skipped` is read again before every turn.
    """
    calls = -(-_BLOCK // batch_size)
    while True:
        seconds = np.full(len(runs), np.nan)
        for i, run in enumerate(runs):
            if i in skipped:
                continue
            synchronize(device)
            started = time.perf_counter()
            for _ in range(calls):
                run()
            synchronize(device)
            seconds[i] = (time.perf_counter() - started) / calls
            advance()
        yield seconds
