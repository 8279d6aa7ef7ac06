"""The number of CPU threads of a training process."""

from __future__ import annotations

import os

import psutil
import torch

from .interruption import launcher


_BY_USER = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def use_threads(wanted: int | None, device: torch.device) -> int:
    """Set and return the number of threads of this process.

    It is `wanted`, or else the user's setting in the environment or for the launcher. Without both, on a CPU, the
    processes share the cores equally, where a launcher would give each process one thread.
    """
    if wanted is not None:
        torch.set_num_threads(wanted)
    elif device.type == "cpu" and _launcher_chose():
        torch.set_num_threads(max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    return torch.get_num_threads()


def cores() -> int:
    """Physical cores that this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, psutil.cpu_count(logical=False) or allowed)


def _launcher_chose() -> bool:
    """Whether the launcher, and not the user, set the number of threads in the environment."""
    started_by = launcher()
    if started_by is None:
        return False
    try:
        given, words = started_by.environ(), started_by.cmdline()
    except psutil.Error:
        return False
    return not any(name in given for name in _BY_USER) and not any("num_cpu_threads" in word for word in words)
