"""Calibration: search how much each layer should merge, on unlabelled images, at equal multiply-adds.

result = calibrate(model, images, flops=0.5)   # sets the plan; result.reductions, result.distance, …
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..configuration import KeepRateConfig
from ..errors import MOST_TOKENS, BadValue, UnsupportedModelError, check_number, check_whole
from ..progress import tqdm
from ..schedule import KeepRateSchedule, ListSchedule, Schedule, falling, reductions_for
from .attach import MergeMixin
from .dense_head import DenseHead
from .distances import feature_distance, kl_to, map_error, output_of
from .encoder import Merging
from .install import merging_of, set_merge_config
from .vision import evaluating, pixel_batches


_SLOPES = (0.0, -0.3, 0.3, 0.6, 0.9)
_FACTORS = (2.0, 1.5, 1.2)


@dataclass(frozen=True)
class Calibration:
    """The result of a search.

    `reductions` is the plan that was set, one r per layer, and `flops` its share of the unmerged multiply-adds.
    `distance` is the distance to the unmerged model under this plan: mean KL of logits in nats, 1 - cosine of
    features, or mean absolute difference of a head's maps. `even_distance` is the distance under the first plan of the
    search: the same r in every layer, or the config's own `layers`. `evaluations` counts the measured plans.
    """

    reductions: tuple[int, ...]
    flops: float
    distance: float
    even_distance: float
    evaluations: int


def calibrate(
    model: Any,
    images: Any,
    flops: float | None = None,
    *,
    evaluations: int = 60,
    batch_size: int = 32,
    features: str = "auto",
    head: Callable[..., Any] | None = None,
) -> Calibration:
    """Find how much each layer should merge, set this plan on a merged model, and return what it gains.

    `images` are pixel values [n, C, H, W], or batches of them (tensors, or dicts with `pixel_values`); 64 to 256 are
    enough, without labels. `flops` is the share of the unmerged multiply-adds to keep (None: the model's present
    share). The search compares plans of at most that share by the distance between the outputs of the hard-merged and
    the unmerged model. It ends after `evaluations` plans, or when no neighbouring plan is better. For a model without
    classes, `features` says what to compare: auto, pooled, cls, patches (their mean) or grid (all patches). A dense
    `head`, a function of patches [B, D, rows, columns], compares its maps [B, H, W] instead. Works with every method.
    The same images give the same plan. Raises ValueError for a share that cannot be reached.
    """
    if not issubclass(type(model), MergeMixin):
        raise UnsupportedModelError("calibrate: the model is not merged; attach(model, DTEMConfig(...)) first.")
    for name, count in (("evaluations", evaluations), ("batch_size", batch_size)):
        check_whole(name, count, 1, MOST_TOKENS)
    if flops is not None:
        check_number("flops", flops, 0, 1, above=True)
    merging = merging_of(model)
    before, flops = merging.config, merging.plan.ratio if flops is None else flops
    try:
        with evaluating(model):
            output = partial(output_of, kind=features) if head is None else partial(_maps, _as_head(head))
            search = _Search(model, pixel_batches(images, batch_size), evaluations, output)
            plans = _over_layers if isinstance(merging.config, KeepRateConfig) else _over_weights
            even, best, schedule = search.run(plans(merging, flops))
    except BaseException:
        set_merge_config(model, before)
        raise
    model.set_reduction(schedule)
    plan = merging_of(model).plan
    return Calibration(tuple(plan.reductions), plan.ratio, best, even, search.evaluations)


class _Search:
    """A descent over a space of plans; each plan is measured once."""

    def __init__(
        self, model: Any, batches: Sequence[Tensor], most: int, output: Callable[[Any, Tensor], tuple[str, Tensor]]
    ) -> None:
        self.model, self.batches, self.most, self.output = model, batches, most, output
        self.evaluations = 0
        self._seen: dict[str, float] = {}
        with torch.no_grad(), model.unmerged():
            self._references = [output(model, x) for x in batches]

    def run(self, plans: _Plans) -> tuple[float, float, Schedule]:
        """The distances of the first and the best plan, and the best plan. Raises ValueError if the first is bad."""
        point, *others = plans.starts
        plans.schedule(point)
        with tqdm(total=self.most, desc="calibrate", unit="plan") as progress:
            first = best = self._distance(plans, point, progress)
            for other in others:
                if (distance := self._distance(plans, other, progress)) < best:
                    best, point = distance, other
            for moves in plans.moves:
                better = True
                while better and self.evaluations < self.most:
                    better = False
                    for move in moves:
                        neighbour = plans.moved(point, *move)
                        if (distance := self._distance(plans, neighbour, progress)) < best:
                            best, point, better = distance, neighbour, True
        return first, best, plans.schedule(point)

    @torch.no_grad()
    def _distance(self, plans: _Plans, point: Any, progress: Any) -> float:
        """Distance to the unmerged model under a plan; infinity for no valid plan, or if no evaluations are left."""
        try:
            schedule = None if point is None else plans.schedule(point)
        except BadValue:  # the point cannot reach the share of multiply-adds
            schedule = None
        key = repr(schedule)
        if schedule is None or (key not in self._seen and self.evaluations == self.most):
            return math.inf
        if key not in self._seen:
            with warnings.catch_warnings():  # no warnings for plans with an r that is too large
                warnings.simplefilter("ignore")
                self.model.set_reduction(schedule)
            pairs = zip(self.batches, self._references, strict=True)
            distances = [_distance(self.output(self.model, x), reference) for x, reference in pairs]
            self._seen[key] = torch.cat(distances).double().mean().item()
            self.evaluations += 1
            progress.update()
            progress.set_postfix(best=f"{min(self._seen.values()):.4g}")
        return self._seen[key]


def _as_head(head: Callable[..., Any]) -> DenseHead:
    return head if isinstance(head, DenseHead) else DenseHead(head, getattr(head, "__name__", type(head).__name__))


def _maps(head: DenseHead, model: Any, pixel_values: Tensor) -> tuple[str, Tensor]:
    return "maps", head.maps_of(model, pixel_values)


def _distance(merged: tuple[str, Tensor], reference: tuple[str, Tensor]) -> Tensor:
    if merged[0] == "logits":
        return kl_to(reference[1], merged[1])
    if merged[0] == "maps":
        return map_error(merged[1], reference[1])
    return feature_distance(reference[1], merged[1], "cosine")


@dataclass(frozen=True)
class _Plans:
    """A space of plans with equal multiply-adds: points to start from, moves, and the schedule of a point.

    `moves` holds lists of moves; the search repeats each list until none of its moves is better. `moved` applies a
    move to a point and returns None for an impossible move.
    """

    starts: Sequence[Any]
    moves: Sequence[Sequence[tuple[int, float]]]
    moved: Callable[..., Any]
    schedule: Callable[[Any], Schedule]


def _over_weights(merging: Merging, flops: float) -> _Plans:
    """A point has one weight per layer, and r is proportional to it; a move scales the weight of one layer."""
    depth, num_tokens = len(merging.cost.layers), merging.plan.num_tokens

    def schedule(weights: tuple[float, ...]) -> Schedule:
        return ListSchedule(tuple(reductions_for(merging.cost, num_tokens, weights, flops)))

    def moved(weights: tuple[float, ...], layer: int, factor: float) -> tuple[float, ...]:
        return (*weights[:layer], weights[layer] * factor, *weights[layer + 1 :])

    starts = [tuple(falling(depth, slope)) for slope in _SLOPES]
    moves = [[*product(range(depth), (factor, 1 / factor))] for factor in _FACTORS]
    return _Plans(starts, moves, moved, schedule)


def _over_layers(merging: Merging, flops: float) -> _Plans:
    """A point is the set of layers that reduce, at one keep rate; a move shifts, drops or adds a layer."""
    depth = len(merging.cost.layers)
    own: KeepRateSchedule = merging.config.schedule

    def schedule(layers: tuple[int, ...]) -> Schedule:
        return replace(own, layers=layers).for_flops(merging.cost, merging.plan.num_tokens, flops)

    def moved(layers: tuple[int, ...], which: int, by: int) -> tuple[int, ...] | None:
        """Shift the `which`-th of the layers; `by` 0 drops or adds the layer with the index `which`."""
        if by == 0:
            return tuple(sorted(set(layers) ^ {which})) or None
        if which >= len(layers) or not 0 <= layers[which] + by < depth or layers[which] + by in layers:
            return None
        return tuple(sorted({*layers[:which], layers[which] + by, *layers[which + 1 :]}))

    moves = [*product(range(depth), (-1, 1))]
    if not merging.config.learns:  # a method that learns has one predictor per reducing layer: their number is fixed
        moves += product(range(depth), (0,))
    return _Plans([tuple(own.chosen(depth))], [moves], moved, schedule)
