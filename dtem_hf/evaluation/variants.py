"""The rows of an evaluation: one backbone under several methods and amounts of merging, sharing its weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..adapter import MergeAdapter
from ..configuration import DTEMConfig, ToMeConfig
from ..errors import BadValue
from ..modeling import attach
from ..schedule import FlopsSchedule, MergePlan


METHODS = ("none", "tome", "dtem")


@dataclass
class Variant:
    """One row: a method and its r (None: unmerged), run on a model that may serve several rows."""

    method: str
    r: Any
    model: Any
    plan: MergePlan

    @contextmanager
    def ready(self) -> Iterator[Any]:
        """The model, set to this row."""
        if self.method == "none":
            with self.model.unmerged():
                yield self.model
        else:
            self.model.set_reduction(self.r)
            yield self.model

    @property
    def label(self) -> str:
        """How the row is called in tables."""
        return self.method if self.r is None else f"{self.method} r={self.shown_r}"

    @property
    def shown_r(self) -> Any:
        """r as JSON."""
        return self.r.to_json() if hasattr(self.r, "to_json") else self.r


def make_variants(
    model: Any, methods: Sequence[str], reductions: Sequence[Any], flops: Sequence[float], adapter: MergeAdapter | None
) -> list[Variant]:
    """The unmerged model, then every method at every r and every share of multiply-adds.

    `model` is plain; all rows share its weights. Raises ValueError for an unknown method.
    """
    unknown = sorted(set(methods) - set(METHODS))
    if unknown:
        raise BadValue("methods", list(methods), f"some of {', '.join(METHODS)}; not {', '.join(unknown)}")
    amounts = [*reductions, *(FlopsSchedule(share) for share in flops)]
    if not amounts and set(methods) != {"none"}:
        raise BadValue("r", list(reductions), "at least one r, or one share in flops")
    reference = attach(share_weights(model), ToMeConfig(r=0))
    rows = [Variant("none", None, reference, reference.merge_plan())]
    for method in methods:
        if method == "none":
            continue
        merged = share_weights(model)
        if method == "tome":
            attach(merged, ToMeConfig(r=0))
        else:
            attach(merged, DTEMConfig(r=0) if adapter is None else adapter)
        for r in amounts:
            merged.set_reduction(r)
            rows.append(Variant(method, r, merged, merged.merge_plan()))
    return rows


def share_weights(model: Any) -> Any:
    """A copy of a model that shares its parameters and buffers."""
    shared = {id(tensor): tensor for tensors in (model.parameters(), model.buffers()) for tensor in tensors}
    return copy.deepcopy(model, shared)
