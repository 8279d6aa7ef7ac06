"""Timing by interleaved runs: each round runs everything once, so other load on the machine falls on all of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
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
    """Seconds of every run in every round: [rounds, runs]. `warmup` rounds are not timed.

    A run on a batch of fewer than 8 images is called until it has seen 8, as a single short call finds its data in no
    cache; its seconds are those of one call. `advance` is called after every run, for a progress bar.
    """
    calls = -(-_BLOCK // batch_size)
    for name, value, low in (("rounds", rounds, 1), ("warmup", warmup, 0)):
        if value < low:
            raise BadValue(name, value, f"{low} or more")
    seconds = np.zeros((rounds, len(runs)))
    for number in range(-warmup, rounds):
        for i, run in enumerate(runs):
            synchronize(device)
            started = time.perf_counter()
            for _ in range(calls):
                run()
            synchronize(device)
            if number >= 0:
                seconds[number, i] = (time.perf_counter() - started) / calls
            advance()
    return seconds
