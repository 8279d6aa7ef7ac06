"""The rows of an evaluation: one backbone under several methods and amounts of merging, sharing its weights."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from ..configuration import DTEMConfig, EViTConfig, MatchingConfig, ToMeConfig
from ..errors import BadValue
from ..hub.adapter import MergeAdapter
from ..models.attach import attach
from ..models.copies import share_weights
from ..models.install import detach
from ..models.timing import synchronize
from ..schedule import FlopsSchedule, KeepRateSchedule, MergePlan, as_schedule


UNMERGED = "none"
_METHODS: dict[str, EvaluatedMethod] = {}


class EvaluatedMethod(ABC):
    """How a method becomes rows: what is attached to the model, and how much of it.

    A subclass is registered under its `name`; a new method needs nothing else.
    """

    name: ClassVar[str]
    takes_adapter: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        if "name" in cls.__dict__:
            _METHODS[cls.name] = cls()

    @abstractmethod
    def attach(self, model: Any, adapter: MergeAdapter | None, **options: Any) -> None:
        """Attach the method to a plain model without merging anything yet; `options` are `attach`'s."""

    def accepts(self, reduction: Any) -> bool:
        """Whether the method understands an r; several methods are given the same list."""
        return not isinstance(as_schedule(reduction), KeepRateSchedule)

    def amounts(self, reductions: Sequence[Any], shares: Sequence[float]) -> list[Any]:
        """One amount for each row: every r that the method accepts, then every share of the multiply-adds."""
        amounts = [r for r in reductions if self.accepts(r)]
        return [*amounts, *(FlopsSchedule(share) for share in shares)]

    def set_amount(self, model: Any, amount: Any) -> None:
        """Make a model with the method attached merge so much. Raises ValueError where it does not fit."""
        model.set_reduction(amount)

    def plan(self, model: Any) -> MergePlan:
        """Tokens and multiply-adds of a model that is set."""
        return model.merge_plan()


class MatchingMethod(EvaluatedMethod):
    """A method with r tokens per layer."""

    config_class: ClassVar[type[MatchingConfig]]

    def attach(self, model: Any, adapter: MergeAdapter | None, **options: Any) -> None:
        attach(model, self.config_class(r=0) if adapter is None else adapter, **options)


class ToMe(MatchingMethod):
    """Merging by keys; there is nothing to learn."""

    name = "tome"
    config_class = ToMeConfig


class DTEM(MatchingMethod):
    """Merging by an adapter's embedding; without one it starts from keys and equals ToMe."""

    name = "dtem"
    config_class = DTEMConfig
    takes_adapter = True


class EViT(EvaluatedMethod):
    """Pruning by CLS attention, which has a keep rate and no r."""

    name = "evit"

    def attach(self, model: Any, adapter: MergeAdapter | None, **options: Any) -> None:
        attach(model, EViTConfig(), **options)

    def accepts(self, reduction: Any) -> bool:
        return isinstance(as_schedule(reduction), KeepRateSchedule)


class Soft(EvaluatedMethod):
    """Soft merging by keys, as training relaxes it: between ToMe and DTEM in the ablation.

    No token is removed, so its multiply-adds are the unmerged model's (grouping is not counted).
    """

    name = "soft"

    def attach(self, model: Any, adapter: MergeAdapter | None, **options: Any) -> None:
        attach(model, DTEMConfig(r=0, relaxation="soft"), **options)

    def plan(self, model: Any) -> MergePlan:
        plan = model.merge_plan()
        tokens = [plan.num_tokens] * len(plan.tokens)
        return replace(plan, tokens=tokens, multiply_adds=plan.unmerged_multiply_adds)


@dataclass
class Variant:
    """One row: a method and its r (None: unmerged), run on a model that may serve several rows.

    `adapter` is the name of the adapter that the method was given, where there are several to tell apart.
    """

    method: str
    r: Any
    model: Any
    plan: MergePlan
    adapter: str | None = None

    @contextmanager
    def ready(self) -> Iterator[Any]:
        """The model, set to this row."""
        if self.method == UNMERGED:
            with self.model.unmerged():
                yield self.model
        else:
            _METHODS[self.method].set_amount(self.model, self.r)
            yield self.model

    def standalone(self) -> Any:
        """A copy that stays set to this row and shares the weights; of the unmerged row, a plain model."""
        model = share_weights(self.model)
        if self.method == UNMERGED:
            return detach(model)
        _METHODS[self.method].set_amount(model, self.r)
        return model

    @property
    def label(self) -> str:
        """The row's name in tables and file names."""
        return self.method if self.r is None else f"{self.method} r={self.shown_r}"

    @property
    def shown_r(self) -> Any:
        """r as JSON."""
        return None if self.r is None else as_schedule(self.r).to_json()

    def facts(self) -> dict[str, Any]:
        """Method, r and, where there are several, the adapter: the head of every result's row."""
        return {
            "method": self.method,
            "r": self.shown_r,
            **({} if self.adapter is None else {"adapter": self.adapter}),
        }

    def costs(self) -> dict[str, Any]:
        """Multiply-adds of an image, their share of the unmerged model's, and the tokens that are left."""
        plan = self.plan
        return {"multiply_adds": plan.multiply_adds, "ratio": plan.ratio, "tokens": plan.tokens[-1]}


def method_names() -> list[str]:
    """What a command line may ask for: the unmerged model, and every method that is registered."""
    return [UNMERGED, *_METHODS]


def make_variants(
    model: Any,
    methods: Sequence[str],
    reductions: Sequence[Any],
    shares: Sequence[float],
    adapters: dict[str, MergeAdapter] | None = None,
    **options: Any,
) -> list[Variant]:
    """The unmerged model, then every method at every r and every share of multiply-adds.

    A method that takes an adapter has its rows once for each of `adapters`, by name. `model` is plain; all rows share
    its weights. `options` are `attach`'s. Raises ValueError for an unknown method.
    """
    unknown = sorted(set(methods) - set(method_names()))
    if unknown:
        raise BadValue("methods", list(methods), f"some of {', '.join(method_names())}; not {', '.join(unknown)}")
    if not reductions and not shares and set(methods) != {UNMERGED}:
        raise BadValue("r", list(reductions), "at least one r, or one share in flops")
    reference = attach(share_weights(model), ToMeConfig(r=0), **options)
    rows = [Variant(UNMERGED, None, reference, reference.merge_plan())]
    for name in methods:
        if name == UNMERGED:
            continue
        method = _METHODS[name]
        given: list[tuple[str | None, MergeAdapter | None]] = [(None, None)]
        if method.takes_adapter and adapters:
            given = [(key if len(adapters) > 1 else None, adapter) for key, adapter in adapters.items()]
        for adapter_name, adapter in given:
            merged = share_weights(model)
            method.attach(merged, adapter, **options)
            amounts = method.amounts(reductions, shares)
            if not amounts:
                raise BadValue("r", list(reductions), f"an amount that {name} understands, or a share in flops")
            for amount in amounts:
                method.set_amount(merged, amount)
                rows.append(Variant(name, amount, merged, method.plan(merged), adapter_name))
    return rows


def run_in_turn(
    variants: Sequence[Variant], run: Callable[[Any], Any], device: torch.device, first: int = 0
) -> tuple[list[Any], NDArray[np.float64]]:
    """Call `run` with the model of every row, from row `first` on; the results and the seconds, in the rows' order."""
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


def median_speed(seconds_per_image: Sequence[float], plain: float | None) -> tuple[float | None, float | None]:
    """Images per second, and the speed-up over `plain` of them (None: this row itself); NaN is a batch without timing.

    Both are None where nothing was timed.
    """
    seconds = np.asarray(seconds_per_image, dtype=float)
    timed = seconds[~np.isnan(seconds)]
    if not len(timed):
        return None, None
    speed = float(1 / np.median(timed))
    return speed, speed / (plain or speed)
