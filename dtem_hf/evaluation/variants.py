"""The rows of an evaluation: one backbone with several methods and amounts of merging, which share its weights."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..configuration import DTEMConfig, KeepRateConfig, MergeConfig, ToMeConfig
from ..costs import MergePlan
from ..deploy.runtimes import Run, make_run
from ..errors import BadValue
from ..hub.adapter import MergeAdapter
from ..models.attach import attach
from ..models.copies import share_weights
from ..models.install import detach
from ..models.timing import synchronize
from ..programs.arguments import check_no_adapter
from ..schedule import FlopsSchedule, KeepRateSchedule, as_schedule


UNMERGED = "none"


@dataclass(frozen=True)
class EvaluatedMethod:
    """How a method makes rows.

    A row attaches `config`, or an adapter of the method if one is given. A `soft` method is untrained and removes no
    token: its rows cost as much as the unmerged model.
    """

    config: MergeConfig
    soft: bool = False

    @property
    def by_default(self) -> bool:
        """Whether a comparison includes the method by default."""
        return not self.soft and not self.config.needs_adapter

    def sources(self, adapters: dict[str, MergeAdapter]) -> dict[str | None, Any]:
        """The adapters or the config to attach, by adapter name if there are several. Raises ValueError for none."""
        own = {name: a for name, a in adapters.items() if a.config.method == self.config.method and not self.soft}
        check_no_adapter("methods", None if own else self.config)
        return {name if len(own) > 1 else None: a for name, a in own.items()} or {None: self.config}

    def amounts(self, reductions: Sequence[Any], shares: Sequence[float]) -> list[Any]:
        """The amounts of merging, one per row: every r that suits the method, then every share of multiply-adds."""
        by_keep_rate = isinstance(self.config, KeepRateConfig)
        known = [r for r in reductions if isinstance(as_schedule(r), KeepRateSchedule) == by_keep_rate]
        return [*known, *map(FlopsSchedule, shares)]

    def plan(self, model: Any, image_size: int | tuple[int, int] | None = None) -> MergePlan:
        """The plan of a model that is set to a row, for images of a size (None: the model's own)."""
        plan: MergePlan = model.merge_plan(image_size)
        if not self.soft:
            return plan
        tokens = [plan.num_tokens] * len(plan.tokens)
        return replace(plan, tokens=tokens, multiply_adds=plan.unmerged_multiply_adds)


# Without an adapter, dtem is untrained and equals tome. "soft" is ToMe with soft merging, for the ablation.
METHODS = {name: EvaluatedMethod(config()) for name, config in MergeConfig._methods.items()}
METHODS["soft"] = EvaluatedMethod(DTEMConfig(relaxation="soft"), soft=True)


@dataclass
class Variant:
    """One row: a method, its r (None: unmerged), and a model, which may serve several rows.

    `adapter` is the adapter's name, if there are several. `run` runs the row on pixels in a runtime other than eager.
    """

    method: str
    r: Any
    model: Any
    plan: MergePlan
    adapter: str | None = None
    run: Run | None = None

    @contextmanager
    def ready(self) -> Iterator[Any]:
        """The model, set to this row. With `run`, a function instead, which returns its first output as `logits`."""
        if self.run is not None:
            run = self.run
            yield lambda pixel_values: SimpleNamespace(logits=run(pixel_values.float())[0])
        elif self.method == UNMERGED:
            with self.model.unmerged():
                yield self.model
        else:
            self.model.set_reduction(self.r)
            yield self.model

    def standalone(self) -> Any:
        """A copy of the model, set to this row, that shares the weights; for the unmerged row, a plain model."""
        model = share_weights(self.model)
        if self.method == UNMERGED:
            return detach(model)
        model.set_reduction(self.r)
        return model

    def in_runtime(self, runtime: str, shape: tuple[int, ...]) -> Variant:
        """This row in a runtime, for images of [C, H, W]."""
        return replace(self, run=make_run(runtime, self.standalone(), shape))

    @property
    def label(self) -> str:
        """The row's name in tables and file names."""
        return self.method if self.r is None else f"{self.method} r={self.shown_r}"

    @property
    def shown_r(self) -> Any:
        """r as JSON."""
        return None if self.r is None else as_schedule(self.r).to_json()

    def facts(self) -> dict[str, Any]:
        """The first entries of a result's row: method, r, and the adapter if there are several."""
        named = {} if self.adapter is None else {"adapter": self.adapter}
        return {"method": self.method, "r": self.shown_r, **named}

    def costs(self) -> dict[str, Any]:
        """Multiply-adds per image, their share of the unmerged model's, and the number of final tokens."""
        plan = self.plan
        return {"multiply_adds": plan.multiply_adds, "ratio": plan.ratio, "tokens": plan.tokens[-1]}


def method_names() -> list[str]:
    """The names that a command line may use: "none" for the unmerged model, and all of METHODS."""
    return [UNMERGED, *METHODS]


def make_variants(
    model: Any,
    methods: Sequence[str],
    reductions: Sequence[Any],
    shares: Sequence[float],
    adapters: dict[str, MergeAdapter] | None = None,
    image_size: int | tuple[int, int] | None = None,
    proportional_attention: bool | None = None,
    **options: Any,
) -> list[Variant]:
    """Make rows: the unmerged model, then every method at every r and every share of multiply-adds.

    A method that learns has rows for each of its `adapters`. `model` is plain, and all rows share its weights. Costs
    are for images of `image_size`; None: the model's own. `proportional_attention` overrides this field of every
    config; `options` go to `attach`. Raises ValueError for an unknown method, for no amount of merging, and for a
    missing adapter that a method needs. Warns of an adapter whose method is none of `methods`.
    """
    unknown = sorted(set(methods) - set(method_names()))
    if unknown:
        raise BadValue("methods", list(methods), f"some of {', '.join(method_names())}; not {', '.join(unknown)}")
    for name, adapter in (adapters or {}).items():
        if adapter.config.method not in methods:
            warnings.warn(
                f"The adapter {name} is not measured: its method, {adapter.config.method}, is none of methods.",
                stacklevel=2,
            )
    if not reductions and not shares and set(methods) != {UNMERGED}:
        raise BadValue("r", list(reductions), "at least one r, or one share in flops")
    reference = attach(share_weights(model), ToMeConfig(r=0), **options)
    rows = [Variant(UNMERGED, None, reference, reference.merge_plan(image_size))]
    for name in methods:
        if name == UNMERGED:
            continue
        method = METHODS[name]
        for adapter_name, merge in method.sources(adapters or {}).items():
            if proportional_attention is not None:
                merge = _weighing(merge, proportional_attention)
            merged = attach(share_weights(model), merge, **options)
            amounts = method.amounts(reductions, shares)
            if not amounts:
                raise BadValue("r", list(reductions), f"an amount that suits {name}, or a share in flops")
            for amount in amounts:
                merged.set_reduction(amount)
                rows.append(Variant(name, amount, merged, method.plan(merged, image_size), adapter_name))
    return rows


def _weighing(merge: Any, proportional_attention: bool) -> Any:
    """A copy of a config, or of an adapter, with another value of `proportional_attention`."""
    if isinstance(merge, MergeAdapter):
        return MergeAdapter(_weighing(merge.config, proportional_attention), merge.tensors, merge.backbone)
    return replace(merge, proportional_attention=proportional_attention)


def run_in_turn(
    variants: Sequence[Variant], run: Callable[[Any], Any], device: torch.device, first: int = 0
) -> tuple[list[Any], NDArray[np.float64]]:
    """Call `run` with the model of every row, starting with row `first`; returns results and seconds in row order."""
    results: list[Any] = [None] * len(variants)
    seconds = np.zeros(len(variants))
    for place in range(len(variants)):
        i = (first + place) % len(variants)
        with variants[i].ready() as model:
            synchronize(device)
            started = time.perf_counter()
            results[i] = run(model)
            synchronize(device)
            seconds[i] = time.perf_counter() - started
    return results, seconds


def median_speeds(seconds_per_image: NDArray[np.float64]) -> list[tuple[float | None, float | None]]:
    """Images per second of every row, and its speed-up over the first row, from seconds [batches, R].

    NaN marks a batch without timing. Both figures are None if no batch was timed.
    """
    timed = seconds_per_image[~np.isnan(seconds_per_image).any(axis=1)]
    if not len(timed):
        return [(None, None)] * seconds_per_image.shape[1]
    speeds = 1 / np.median(timed, axis=0)
    return list(zip(speeds.tolist(), (speeds / speeds[0]).tolist(), strict=True))
