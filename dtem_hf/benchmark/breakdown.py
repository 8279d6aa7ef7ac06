"""Time the parts of a merged model: the metric, matching and merging, the attention bias, and the rest."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from .. import ops
from ..costs import MergePlan
from ..families import find_encoder
from ..models.install import merging_of
from ..models.timing import synchronize


# The functions of `ops` that belong to each part.
_PARTS = {
    "matching and merging": (
        "bipartite_soft_matching",
        "fuse_tokens",
        "match_by_energy",
        "merge_tokens",
        "prune_tokens",
        "restore_lengths",
        "split_by_score",
        "match_pruned_to_kept",
    ),
    "attention bias": ("size_bias",),
}
PARTS = ("metric", *_PARTS)


class _Stopwatch:
    """Times calls on the device; on CUDA by events, which do not make the device wait."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function, so that the time of its calls counts for a part."""

        def call(*args: Any, **kwargs: Any) -> Any:
            started = self._now()
            result = function(*args, **kwargs)
            self._spans[part].append((started, self._now()))
            return result

        return call

    def seconds(self) -> dict[str, float]:
        """The seconds of every part since the last call."""
        synchronize(self.device)
        taken = {part: sum(self._between(*span) for span in spans) for part, spans in self._spans.items()}
        self._spans.clear()
        return taken

    def _now(self) -> Any:
        if self.device.type != "cuda":
            synchronize(self.device)
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, started: Any, ended: Any) -> float:
        return started.elapsed_time(ended) / 1e3 if self.device.type == "cuda" else ended - started


@torch.inference_mode()
def break_down(
    model: nn.Module, run: Callable[[], Any], device: torch.device, rounds: int, warmup: int
) -> dict[str, Any] | None:
    """Median seconds and shares of a merged model's parts in eager runs; None for a plain model.

    The functions are wrapped only during this call.
    """
    if not hasattr(model, "merge_config"):
        return None
    watch = _Stopwatch(device)
    taken: dict[str, list[float]] = defaultdict(list)
    with _parts_timed(model, watch):
        for number in range(-warmup, rounds):
            synchronize(device)
            started = time.perf_counter()
            run()
            synchronize(device)
            whole = time.perf_counter() - started
            parts = watch.seconds()
            if number >= 0:
                for part in PARTS:
                    taken[part].append(parts.get(part, 0.0))
                taken["rest"].append(whole - sum(parts.values()))
    seconds = {part: float(np.median(values)) for part, values in taken.items()}
    whole = sum(seconds.values())
    return {"seconds": seconds, "shares": {part: value / whole for part, value in seconds.items()}}


@contextmanager
def _parts_timed(model: Any, watch: _Stopwatch) -> Iterator[None]:
    method: Any = merging_of(model).method
    wrapped: list[tuple[Any, str, str]] = [(ops, name, part) for part, names in _PARTS.items() for name in names]
    if hasattr(method, "metric"):
        wrapped.append((method, "metric", "metric"))
    with ExitStack() as stack:
        for owner, name, part in wrapped:
            stack.enter_context(patch.object(owner, name, watch.timed(part, getattr(owner, name))))
        yield


class MergingAlone(nn.Module):
    """Matching and merging of every layer of a plan, on random tokens, without the rest of the model.

    The parts of a compiled model cannot be timed separately, so this module is timed instead.
    """

    def __init__(self, plan: MergePlan, num_prefix_tokens: int) -> None:
        super().__init__()
        self.reductions = [r for r in plan.reductions if r]
        self.num_prefix_tokens = num_prefix_tokens

    def forward(self, tokens: Sequence[Tensor], metrics: Sequence[Tensor], sizes: Sequence[Tensor]) -> list[Tensor]:
        merged: list[Tensor] = []
        for x, metric, size, r in zip(tokens, metrics, sizes, self.reductions, strict=True):
            merged += ops.merge_tokens(x, size, ops.bipartite_soft_matching(metric, r, self.num_prefix_tokens))
        return merged


def merging_alone(model: Any, plan: MergePlan, batch_size: int, compile_mode: str) -> Callable[[], Any] | None:
    """A call of a model's matching and merging, compiled; None if the model does not merge as ToMe does."""
    if not hasattr(model, "merge_config") or not any(plan.reductions):
        return None
    merging = merging_of(model)
    if not merging.method.merges_halves:
        return None
    like: Tensor = next(find_encoder(model)[1].parameters())
    entering = [plan.num_tokens, *plan.tokens[:-1]]
    counts = [n for n, r in zip(entering, plan.reductions, strict=True) if r]

    def noise(width: int) -> list[Tensor]:
        return [torch.randn(batch_size, n, width, device=like.device, dtype=like.dtype) for n in counts]

    inputs = (
        noise(merging.method.geometry.hidden_size),
        noise(merging.method.metric_cost().width),
        [torch.ones(batch_size, n, device=like.device) for n in counts],
    )
    compiled = torch.compile(MergingAlone(plan, merging.cost.num_prefix_tokens), fullgraph=True, mode=compile_mode)
    return lambda: compiled(*inputs)
