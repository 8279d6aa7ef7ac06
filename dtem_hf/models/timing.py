"""Timing by interleaved runs: each round runs everything once, so other load on the machine falls on all of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch

from ..errors import BadValue


Run = Callable[[], Any]
# Images that a run sees in one turn, or more.
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
    """Seconds of every run in every round: [rounds, runs]. `warmup` rounds are not timed; see `timed_rounds`."""
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
    """Rounds without an end, each of them the seconds of every run: [runs].

    A run on a batch of fewer than 8 images is called until it has seen 8, as a single short call finds its data in no
    cache; its seconds are those of one call. `advance` is called after every run, for a progress bar. `skipped` is
    looked at before every run: the numbers of those that run no longer; their seconds are NaN.
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
