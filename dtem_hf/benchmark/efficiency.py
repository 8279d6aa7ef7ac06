"""The costs of a model: multiply-adds, images per second, peak memory; and the batch size from which merging pays."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from ..models.timing import Run


def count_multiply_adds(run: Run) -> int:
    """Multiply-adds of a call, by torch's counter: matrix products and convolutions."""
    # The math backend runs attention as two matrix products: the counter does not know every fused kernel.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops()) // 2


def peak_memory(run: Run, device: torch.device) -> int | None:
    """The peak of the memory that a call allocates for tensors, in bytes, without tensors that existed before.

    None for a device whose allocator cannot be observed.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"]
    held = np.cumsum([change for _, change in sorted(changes, key=lambda pair: pair[0])], dtype=np.int64)
    return int(max(0, *held)) if len(held) else 0


def spread(values: np.ndarray) -> dict[str, float]:
    """Median and quartiles of numbers, without NaN, as JSON."""
    return dict(zip(("median", "q25", "q75"), np.nanquantile(values, (0.5, 0.25, 0.75)).tolist(), strict=True))


def speeds(seconds: np.ndarray, batch_size: int, references: Sequence[int]) -> list[dict[str, Any]]:
    """Images per second and speed-up of every run: seconds [rounds, runs] -> one dict per run.

    `references` holds, for every run, the index of the run to compare it with.
    """
    return [
        {
            "images_per_second": spread(batch_size / seconds[:, i]),
            "speedup": spread(seconds[:, reference] / seconds[:, i]),
        }
        for i, reference in enumerate(references)
    ]


def break_even(speedup_by_batch_size: Mapping[int, float]) -> int | None:
    """The smallest batch size from which merging is never slower than the unmerged model; None if there is none."""
    smallest = None
    for batch_size in sorted(speedup_by_batch_size, reverse=True):
        if speedup_by_batch_size[batch_size] < 1:
            break
        smallest = batch_size
    return smallest
