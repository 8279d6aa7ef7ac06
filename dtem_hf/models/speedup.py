"""Find how much to merge for a wanted speed-up, by measuring on the model's device."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from ..errors import MOST_TOKENS, BadValue, check_number, check_whole
from .install import set_merge_config
from .timing import time_interleaved
from .vision import evaluating, image_shape, run_on_pixels


def share_for_speedup(model: Any, target: float, batch_size: int, rounds: int = 5) -> float:
    """The largest share of the multiply-adds, in hundredths, at which a merged model is `target` times as fast.

    A bisection over shares times merged and unmerged passes over noise in turns, as `dtem-hf advise` does (about a
    minute on a laptop for a small model). The model's config and mode are restored at the end. Raises ValueError if
    `target` is out of reach; the message says which speed-up is possible.
    """
    check_number("target_speedup", target, 1, 1000, above=True)
    check_whole("batch_size", batch_size, 1, MOST_TOKENS)
    config = model.merge_config
    measured: dict[int, float] = {}

    def reaches(hundredths: int) -> bool:
        model.set_reduction(flops=hundredths / 100)
        with evaluating(model):
            measured[hundredths] = _speedup(model, batch_size, rounds)
        return measured[hundredths] >= target

    try:
        least = next(share for share in range(1, 101) if _is_feasible(model, share / 100))
        low, high = least, 99  # bisection assumes that fewer multiply-adds are never slower
        if not reaches(low):
            most = (
                f"at most {measured[low]:.2f}, which merging as much as possible gives with {batch_size} images here"
            )
            raise BadValue("target_speedup", target, f"{most} in eager; dtem-hf advise measures other runtimes")
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if reaches(middle) else (low, middle - 1)
        return low / 100
    finally:
        set_merge_config(model, config)


def _is_feasible(model: Any, share: float) -> bool:
    try:
        model.set_reduction(flops=share)
    except BadValue:
        return False
    return True


@torch.inference_mode()
def _speedup(model: Any, batch_size: int, rounds: int) -> float:
    """Median over rounds of unmerged over merged time, for a batch of noise."""
    example = next(model.parameters())
    pixels = torch.randn(batch_size, *image_shape(model), device=example.device, dtype=example.dtype)
    merged = partial(run_on_pixels, model, pixels)

    def plain() -> None:
        with model.unmerged():
            merged()

    seconds = time_interleaved([plain, merged], example.device, rounds, warmup=1, batch_size=batch_size)
    return float(np.median(seconds[:, 0] / seconds[:, 1]))
