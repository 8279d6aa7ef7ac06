"""Schedules: how many tokens each layer merges away. A schedule resolves to one r per layer."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import accumulate, pairwise
from typing import Any, ClassVar, Self

from .costs import EncoderCost
from .errors import MOST_LAYERS, MOST_TOKENS, BadValue, check_number, check_whole


def _spread(weights: Sequence[float], total: int) -> list[int]:
    """Split `total` into whole numbers in proportion to `weights`, by rounding the running sum."""
    whole = sum(weights)
    upto = [int(total * running / whole + 0.5) if whole else 0 for running in accumulate(weights)]
    return [later - earlier for earlier, later in pairwise([0, *upto])]


def falling(num_layers: int, slope: float) -> list[float]:
    """Weights that fall linearly over the layers, from 1 + slope to 1 - slope."""
    return [1 + slope * (1 - 2 * i / max(num_layers - 1, 1)) for i in range(num_layers)]


def reductions_for(cost: EncoderCost, num_tokens: int, weights: Sequence[float], flops: float) -> list[int]:
    """One r per layer, in proportion to `weights`: the fewest merged tokens that reach the share `flops`.

    `flops` is a share of the unmerged multiply-adds. Raises ValueError if merging everything does not reach it.
    """

    def ratio(total: int) -> float:
        return cost.plan(num_tokens, _spread(weights, total)).ratio

    totals = range(num_tokens * len(cost.layers) + 1)
    if ratio(totals[-1]) > flops:
        left = f"merging everything still leaves {ratio(totals[-1]):.3f} of the multiply-adds; choose a larger share"
        raise BadValue("flops", flops, left)
    # The first merged token of a layer costs more than it saves, so bisection would not find that 0 is enough.
    if ratio(0) <= flops:
        return _spread(weights, 0)
    return _spread(weights, bisect_left(totals, True, key=lambda total: ratio(total) <= flops))


class Schedule:
    """Base of all schedules. A subclass is a frozen dataclass with a `kind` and a `resolve`."""

    kind: ClassVar[str]
    _kinds: ClassVar[dict[str, type[Schedule]]] = {}

    def __init_subclass__(cls) -> None:
        Schedule._kinds[cls.kind] = cls

    def resolve(self, cost: EncoderCost, num_tokens: int) -> list[int]:
        """One r per layer, before clamping. Raises ValueError if the schedule does not fit the encoder."""
        raise NotImplementedError

    def to_json(self) -> Any:
        """An int, a list, or a dict with `kind`, which `as_schedule` reads back."""
        return {"kind": self.kind, **asdict(self)}  # type: ignore[call-overload]


@dataclass(frozen=True)
class ConstantSchedule(Schedule):
    """The same r in every layer."""

    r: int
    kind: ClassVar[str] = "constant"

    def __post_init__(self) -> None:
        check_whole("r", self.r, 0, MOST_TOKENS)

    def resolve(self, cost: EncoderCost, num_tokens: int) -> list[int]:
        return [self.r] * len(cost.layers)

    def to_json(self) -> Any:
        return self.r


@dataclass(frozen=True)
class ListSchedule(Schedule):
    """One r for each layer."""

    reductions: tuple[int, ...]
    kind: ClassVar[str] = "list"

    def __post_init__(self) -> None:
        object.__setattr__(self, "reductions", _checked_list("r", self.reductions, MOST_TOKENS))

    def resolve(self, cost: EncoderCost, num_tokens: int) -> list[int]:
        if len(self.reductions) != len(cost.layers):
            expected = f"{len(self.reductions)} layers and the model has {len(cost.layers)}; give one r per layer"
            raise BadValue("r", list(self.reductions), expected)
        return list(self.reductions)

    def to_json(self) -> Any:
        return list(self.reductions)


@dataclass(frozen=True)
class LinearSchedule(Schedule):
    """r falls linearly over the layers from r (1 + slope) to r (1 - slope); `r` is the mean, 0 ≤ slope ≤ 1."""

    r: float
    slope: float = 0.5
    kind: ClassVar[str] = "linear"

    def __post_init__(self) -> None:
        check_number("r", self.r, 0, MOST_TOKENS)
        check_number("slope", self.slope, 0, 1)

    def resolve(self, cost: EncoderCost, num_tokens: int) -> list[int]:
        return _spread(falling(len(cost.layers), self.slope), round(self.r * len(cost.layers)))


@dataclass(frozen=True)
class InflectedSchedule(Schedule):
    """ToMe's schedule: r (1 - inflection) in the first layer to r (1 + inflection) in the last; mean r, truncated.

    -1 ≤ inflection ≤ 1; -1 merges most at the start. Source: ToMe, arXiv 2210.09461.
    """

    r: int
    inflection: float = -1.0
    kind: ClassVar[str] = "inflected"

    def __post_init__(self) -> None:
        check_whole("r", self.r, 0, MOST_TOKENS)
        check_number("inflection", self.inflection, -1, 1)

    def resolve(self, cost: EncoderCost, num_tokens: int) -> list[int]:
        first = int(self.r * (1 - self.inflection))
        step = (2 * (self.r - first)) / max(len(cost.layers) - 1, 1)
        return [int(first + step * i) for i in range(len(cost.layers))]


@dataclass(frozen=True)
class FlopsSchedule(Schedule):
    """The fewest merged tokens that bring a model to the share `flops` of its multiply-adds.

    r falls linearly over the layers, in proportion to 1 + slope in the first and 1 - slope in the last.
    """

    flops: float
    slope: float = 0.0
    kind: ClassVar[str] = "flops"

    def __post_init__(self) -> None:
        check_number("flops", self.flops, 0, 1, above=True)
        check_number("slope", self.slope, 0, 1)

    def resolve(self, cost: EncoderCost, num_tokens: int) -> list[int]:
        return reductions_for(cost, num_tokens, falling(len(cost.layers), self.slope), self.flops)


@dataclass(frozen=True)
class KeepRateSchedule(Schedule):
    """EViT's schedule: some layers keep a share of their patch tokens and fuse the others into one.

    `layers` count from 0; None: the layers at one, two and three quarters of the depth. Source: EViT (arXiv
    2202.07800).
    """

    keep_rate: float
    layers: tuple[int, ...] | None = None
    kind: ClassVar[str] = "keep_rate"

    def __post_init__(self) -> None:
        check_number("keep_rate", self.keep_rate, 0, 1, above=True)
        if self.layers is not None:
            object.__setattr__(self, "layers", _checked_list("layers", self.layers, MOST_LAYERS - 1))
            if len(set(self.layers)) < len(self.layers):
                raise BadValue("layers", list(self.layers), "each layer once")

    def resolve(self, cost: EncoderCost, num_tokens: int) -> list[int]:
        reductions = [0] * len(cost.layers)
        first = patches = num_tokens - cost.num_prefix_tokens
        for stage, layer in enumerate(self.chosen(len(reductions)), start=1):
            reductions[layer] = max(patches - self.left(patches, first, stage), 0)
            patches -= reductions[layer]
        return reductions

    def chosen(self, depth: int) -> list[int]:
        """The layers that reduce, in order. Raises ValueError if an encoder of this depth lacks one of them."""
        layers = {depth // 4, depth // 2, 3 * depth // 4} if self.layers is None else set(self.layers)
        if layers and max(layers) >= depth:
            raise BadValue("layers", sorted(layers), f"layers from 0 to {depth - 1}, as the model has {depth}")
        return sorted(layers)

    def left(self, patches: int, first: int, stage: int) -> int:
        """The patch tokens that a reducing layer leaves of the `patches` that enter it.

        `first` patches entered the encoder; `stage` numbers the reducing layers from 1.
        """
        return math.ceil(self.keep_rate * patches - 1e-9) + 1  # plus the fused token

    def for_flops(self, cost: EncoderCost, num_tokens: int, flops: float) -> Self:
        """The highest keep rate, in thousandths, that brings the model to a share of its multiply-adds."""
        check_number("flops", flops, 0, 1, above=True)
        # No bisection: the ratio is not monotonic, as the first fused token of a layer costs more than it saves.
        for thousandths in range(1000, 0, -1):
            schedule = replace(self, keep_rate=thousandths / 1000)
            if cost.plan(num_tokens, schedule.resolve(cost, num_tokens)).ratio <= flops:
                return schedule
        raise BadValue("flops", flops, "more, or reduce in more or earlier layers: no keep rate is low enough")


@dataclass(frozen=True)
class SqueezeSchedule(KeepRateSchedule):
    """TPS's schedule: the s-th reducing layer leaves ⌊ρˢ N⌋ of the N patches, at least one.

    `keep_rate` is ρ. `layers` count from 0; None: the layers at one, two and three quarters of the depth. Source: TPS,
    arXiv 2304.10716.
    """

    kind: ClassVar[str] = "squeeze"

    def left(self, patches: int, first: int, stage: int) -> int:
        return max(math.floor(self.keep_rate**stage * first + 1e-9), 1)


@dataclass(frozen=True)
class SqueezeBetweenSchedule(SqueezeSchedule):
    """TPS's schedule in front of the layers: tokens that leave in front of layer i count for layer i - 1.

    The first layer cannot be one of them.
    """

    kind: ClassVar[str] = "squeeze_between"

    def resolve(self, cost: EncoderCost, num_tokens: int) -> list[int]:
        return [*super().resolve(cost, num_tokens)[1:], 0]

    def chosen(self, depth: int) -> list[int]:
        layers = super().chosen(depth)
        if self.layers is None:
            return sorted({max(layer, 1) for layer in layers} - {depth})
        if 0 in layers:
            raise BadValue("layers", layers, "layers from 1 on, as tokens are squeezed in front of a layer")
        return layers


def _checked_list(field: str, values: Any, most: int) -> tuple[int, ...]:
    """Check a list of whole numbers from 0 to `most`, one per layer, and return it as a tuple."""
    if not isinstance(values, (list, tuple)) or len(values) > MOST_LAYERS:
        raise BadValue(field, values, f"a list of at most {MOST_LAYERS} whole numbers, one per layer")
    for i, value in enumerate(values):
        check_whole(f"{field}[{i}]", value, 0, most)
    return tuple(values)


R_EXPECTED = "a whole number, or a list with one for each layer, or a schedule such as " + (
    '{"kind": "linear", "r": 13, "slope": 0.5}'
)


def as_schedule(r: Any) -> Schedule:
    """Make a schedule of the user's r: an int, a list with one int per layer, a schedule, or a schedule's JSON."""
    if isinstance(r, Schedule):
        return r
    if isinstance(r, (list, tuple)):
        return ListSchedule(tuple(r))
    if isinstance(r, int) and not isinstance(r, bool):
        return ConstantSchedule(r)
    if not isinstance(r, dict):
        raise BadValue("r", r, R_EXPECTED)
    known = Schedule._kinds.get(str(r.get("kind")))
    if known is None:
        raise BadValue("r", r, f"a schedule of a kind among {', '.join(sorted(Schedule._kinds))}")
    try:
        return known(**{name: value for name, value in r.items() if name != "kind"})
    except TypeError as error:
        names = ", ".join(f.name for f in fields(known))  # type: ignore[arg-type]
        raise BadValue("r", r, f"a {known.kind} schedule has these fields: {names}") from error
