"""How many tokens each layer merges away: schedules, the costs they are weighed by, and the plan they come to.

A schedule is what a user asks for (`ConstantSchedule(16)`, `FlopsSchedule(0.5)`); `resolve` turns it into one r per
layer for a given encoder and number of tokens. Where a layer has too few tokens left for its r, it merges as many as
it can.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, NamedTuple

from .errors import BadValue


class MetricCost(NamedTuple):
    """Multiply-adds of a layer's metric: per token, per image, and the width of the features that are compared."""

    per_token: int
    per_image: int = 0
    width: int = 0


@dataclass(frozen=True)
class LayerCost:
    """Multiply-adds of one encoder layer, as numbers that do not depend on how many tokens there are.

    `before` and `after`: per token, in front of and behind the merge (projections; MLP). `per_pair`: per query-key
    pair (scores and values). `metric` is spent only where tokens leave.
    """

    before: int
    per_pair: int
    after: int
    metric: MetricCost

    def multiply_adds(self, num_tokens: int, r: int, num_prefix_tokens: int) -> int:
        """Multiply-adds of the layer for one image that enters with `num_tokens` tokens and leaves with r fewer."""
        total = num_tokens * self.before + num_tokens**2 * self.per_pair + (num_tokens - r) * self.after
        if r:
            free = num_tokens - num_prefix_tokens
            total += num_tokens * self.metric.per_token + self.metric.per_image
            total += (free // 2) * (free - free // 2) * self.metric.width
        return total


@dataclass(frozen=True)
class EncoderCost:
    """Multiply-adds of a model in its encoder's layers and around them.

    `stem` per patch, `head` per image, `tail` per token that the encoder returns. `pairwise`: a layer can merge at
    most half of its free tokens, as each of them needs a partner that stays.
    """

    layers: tuple[LayerCost, ...]
    stem: int
    head: int
    num_prefix_tokens: int
    tail: int = 0
    pairwise: bool = True

    def plan(self, num_tokens: int, reductions: Sequence[int]) -> MergePlan:
        """The plan that the given r per layer come to for `num_tokens` tokens (clamped where too few are left)."""
        if self.pairwise:
            reductions = clamp_reductions(reductions, num_tokens, self.num_prefix_tokens)
        tokens, costs, plain, n = [], [], [], num_tokens
        for layer, r in zip(self.layers, reductions, strict=True):
            costs.append(layer.multiply_adds(n, r, self.num_prefix_tokens))
            plain.append(layer.multiply_adds(num_tokens, 0, self.num_prefix_tokens))
            n -= r
            tokens.append(n)
        around = self.stem * (num_tokens - self.num_prefix_tokens) + self.head
        return MergePlan(
            num_tokens=num_tokens,
            reductions=list(reductions),
            tokens=tokens,
            layer_multiply_adds=costs,
            multiply_adds=around + self.tail * n + sum(costs),
            unmerged_multiply_adds=around + self.tail * num_tokens + sum(plain),
            output_tokens=n,
        )


@dataclass(frozen=True)
class MergePlan:
    """What merging does to one image, known without running the model.

    `num_tokens` enter the first layer (prefix included); layer i merges `reductions[i]` away and hands `tokens[i]` on.
    `layer_multiply_adds` are the encoder layers', `multiply_adds` the whole model's, or of a model that does more than
    see (a captioner, a dual encoder) its image encoder's. `output_tokens` reach whoever reads the encoder: a decoder,
    say, for all frames of an input together.
    """

    num_tokens: int
    reductions: list[int]
    tokens: list[int]
    layer_multiply_adds: list[int]
    multiply_adds: int
    unmerged_multiply_adds: int
    output_tokens: int

    @property
    def ratio(self) -> float:
        """Multiply-adds as a share of the unmerged model's."""
        return self.multiply_adds / self.unmerged_multiply_adds

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, `ratio` included."""
        return {**asdict(self), "ratio": self.ratio}

    def __str__(self) -> str:
        rows = [f"{'layer':>5} {'r':>4} {'tokens':>7} {'M multiply-adds':>16}"]
        for i, (r, n, cost) in enumerate(zip(self.reductions, self.tokens, self.layer_multiply_adds, strict=True)):
            rows.append(f"{i:>5} {r:>4} {n:>7} {cost / 1e6:>16.1f}")
        rows.append(
            f"{self.num_tokens} -> {self.tokens[-1]} tokens; {self.multiply_adds / 1e9:.3f} G multiply-adds per "
            f"image, {self.ratio:.3f} of the unmerged {self.unmerged_multiply_adds / 1e9:.3f} G"
        )
        return "\n".join(rows)


def clamp_reductions(reductions: Sequence[int], num_tokens: int, num_prefix_tokens: int) -> list[int]:
    """Each layer merges at most half of the non-prefix tokens that reach it."""
    clamped = []
    for r in reductions:
        clamped.append(min(r, max(num_tokens - num_prefix_tokens, 0) // 2))
        num_tokens -= clamped[-1]
    return clamped


def _spread(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers in proportion to `weights` that add up to `total`, by rounding the running sum."""
    whole = sum(weights)
    running, given, parts = 0.0, 0, []
    for weight in weights:
        running += weight
        upto = int(total * running / whole + 0.5) if whole else 0
        parts.append(upto - given)
        given = upto
    return parts


def _falling(num_layers: int, slope: float) -> list[float]:
    """Weights around 1 that fall linearly from 1 + slope to 1 - slope over the layers."""
    if num_layers == 1:
        return [1.0]
    return [1 + slope * (1 - 2 * i / (num_layers - 1)) for i in range(num_layers)]


def reductions_for(cost: EncoderCost, num_tokens: int, weights: Sequence[float], flops: float) -> list[int]:
    """The fewest merged tokens, in proportion to one weight per layer, that reach a share of the multiply-adds.

    Raises ValueError where merging everything does not reach it.
    """

    def ratio(total: int) -> float:
        return cost.plan(num_tokens, _spread(weights, total)).ratio

    fewest, most = 0, num_tokens * len(cost.layers)
    if ratio(most) > flops:
        raise BadValue("flops", flops, f"merging everything still leaves {ratio(most):.3f} of the multiply-adds")
    while fewest < most:
        middle = (fewest + most) // 2
        if ratio(middle) <= flops:
            most = middle
        else:
            fewest = middle + 1
    # A layer's first merged token costs more than it saves: bisection cannot see that none at all would do.
    return _spread(weights, 0 if ratio(0) <= flops else most)


class Schedule:
    """Base of all schedules; a subclass is a frozen dataclass with a `kind` and a `resolve`."""

    kind: ClassVar[str]
    _kinds: ClassVar[dict[str, type[Schedule]]] = {}

    def __init_subclass__(cls) -> None:
        Schedule._kinds[cls.kind] = cls

    def resolve(self, cost: EncoderCost, num_tokens: int) -> list[int]:
        """One r per layer, before clamping. Raises ValueError where the schedule does not fit the encoder."""
        raise NotImplementedError

    def to_json(self) -> Any:
        """What `as_schedule` reads back: an int, a list, or a dict with `kind`."""
        return {"kind": self.kind, **asdict(self)}  # type: ignore[call-overload]


@dataclass(frozen=True)
class ConstantSchedule(Schedule):
    """The same r in every layer."""

    r: int
    kind: ClassVar[str] = "constant"

    def __post_init__(self) -> None:
        _check_reduction("r", self.r)

    def resolve(self, cost: EncoderCost, num_tokens: int) -> list[int]:
        return [self.r] * len(cost.layers)

    def to_json(self) -> Any:
        return self.r


@dataclass(frozen=True)
class ListSchedule(Schedule):
    """One r per layer, written out."""

    reductions: tuple[int, ...]
    kind: ClassVar[str] = "list"

    def __post_init__(self) -> None:
        object.__setattr__(self, "reductions", tuple(self.reductions))
        for i, r in enumerate(self.reductions):
            _check_reduction(f"r[{i}]", r)

    def resolve(self, cost: EncoderCost, num_tokens: int) -> list[int]:
        if len(self.reductions) != len(cost.layers):
            raise BadValue(
                "r",
                list(self.reductions),
                f"it lists {len(self.reductions)} layers and the model has {len(cost.layers)}; give one r per layer",
            )
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
        _check_number("r", self.r, 0, None)
        _check_number("slope", self.slope, 0, 1)

    def resolve(self, cost: EncoderCost, num_tokens: int) -> list[int]:
        layers = len(cost.layers)
        return _spread(_falling(layers, self.slope), round(self.r * layers))


@dataclass(frozen=True)
class InflectedSchedule(Schedule):
    """ToMe's schedule: r (1 - inflection) in the first layer to r (1 + inflection) in the last; mean r, truncated.

    -1 ≤ inflection ≤ 1; -1 merges most at the start. Source: ToMe, arXiv 2210.09461.
    """

    r: int
    inflection: float = -1.0
    kind: ClassVar[str] = "inflected"

    def __post_init__(self) -> None:
        _check_reduction("r", self.r)
        _check_number("inflection", self.inflection, -1, 1)

    def resolve(self, cost: EncoderCost, num_tokens: int) -> list[int]:
        layers = len(cost.layers)
        first = int(self.r * (1 - self.inflection))
        step = (2 * (self.r - first)) / max(layers - 1, 1)
        return [int(first + step * i) for i in range(layers)]


@dataclass(frozen=True)
class FlopsSchedule(Schedule):
    """The fewest merged tokens that bring the model to `flops` times its multiply-adds (0 < flops ≤ 1).

    Spread evenly over the layers, or falling linearly by ± `slope` around the mean.
    """

    flops: float
    slope: float = 0.0
    kind: ClassVar[str] = "flops"

    def __post_init__(self) -> None:
        _check_number("flops", self.flops, 0, 1)
        if self.flops == 0:
            raise BadValue("flops", self.flops, "a number above 0, up to 1")
        _check_number("slope", self.slope, 0, 1)

    def resolve(self, cost: EncoderCost, num_tokens: int) -> list[int]:
        return reductions_for(cost, num_tokens, _falling(len(cost.layers), self.slope), self.flops)


@dataclass(frozen=True)
class KeepRateSchedule(Schedule):
    """EViT's: the given layers keep a share of their patch tokens and fuse the others into one (arXiv 2202.07800).

    `layers` count from 0; None stands for those at one, two and three quarters of the depth.
    """

    keep_rate: float
    layers: tuple[int, ...] | None = None
    kind: ClassVar[str] = "keep_rate"

    def __post_init__(self) -> None:
        _check_number("keep_rate", self.keep_rate, 0, 1)
        if self.keep_rate == 0:
            raise BadValue("keep_rate", self.keep_rate, "a number above 0, up to 1")
        if self.layers is not None:
            if not isinstance(self.layers, (list, tuple)):
                raise BadValue("layers", self.layers, "a list of layers, counted from 0, or null")
            for i, layer in enumerate(self.layers):
                if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
                    raise BadValue(f"layers[{i}]", layer, "a layer's number, counted from 0")
            if len(set(self.layers)) < len(self.layers):
                raise BadValue("layers", list(self.layers), "each layer once")
            object.__setattr__(self, "layers", tuple(self.layers))

    def resolve(self, cost: EncoderCost, num_tokens: int) -> list[int]:
        depth = len(cost.layers)
        layers = {depth // 4, depth // 2, 3 * depth // 4} if self.layers is None else set(self.layers)
        if layers and max(layers) >= depth:
            raise BadValue("layers", sorted(layers), f"layers from 0 to {depth - 1}, as the model has {depth}")
        reductions = []
        for layer in range(depth):
            patches = num_tokens - cost.num_prefix_tokens
            kept = math.ceil(self.keep_rate * patches - 1e-9) if layer in layers else patches
            # The fused token takes a place of its own.
            reductions.append(max(patches - kept - 1, 0))
            num_tokens -= reductions[-1]
        return reductions

    def for_flops(self, cost: EncoderCost, num_tokens: int, flops: float) -> KeepRateSchedule:
        """The highest keep rate, in thousandths, that brings the model to a share of its multiply-adds."""
        FlopsSchedule(flops)  # checks it

        def fits(thousandths: int) -> bool:
            schedule = KeepRateSchedule(thousandths / 1000, self.layers)
            return cost.plan(num_tokens, schedule.resolve(cost, num_tokens)).ratio <= flops

        # One by one: a layer's first fused token costs more than it saves, which bisection cannot see.
        highest = next(filter(fits, range(1000, 0, -1)), None)
        if highest is None:
            raise BadValue("flops", flops, "more, or reduce in more or earlier layers: no keep rate is low enough")
        return KeepRateSchedule(highest / 1000, self.layers)


def _check_reduction(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise BadValue(name, value, "a whole number of tokens, 0 or more")


def _check_number(name: str, value: Any, low: float, high: float | None) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
    if not is_number or value < low or (high is not None and value > high) or value == float("inf"):
        raise BadValue(name, value, f"a number from {low} to {high}" if high is not None else f"a number ≥ {low}")


def as_schedule(r: Any) -> Schedule:
    """Read what a user may give for r: an int, a list with one int per layer, a schedule, or a schedule's JSON."""
    if isinstance(r, Schedule):
        return r
    if isinstance(r, (list, tuple)):
        return ListSchedule(tuple(r))
    if isinstance(r, dict):
        known = Schedule._kinds.get(str(r.get("kind")))
        if known is None:
            raise BadValue("r", r, f"a schedule of a kind among {', '.join(sorted(Schedule._kinds))}")
        names = {f.name for f in fields(known)}  # type: ignore[arg-type]
        unknown = set(r) - names - {"kind"}
        if unknown:
            raise BadValue(
                "r", r, f"a {known.kind} schedule has no {', '.join(sorted(unknown))}, only {sorted(names)}"
            )
        try:
            return known(**{name: value for name, value in r.items() if name != "kind"})
        except TypeError as error:
            raise BadValue("r", r, f"a {known.kind} schedule with {sorted(names)}") from error
    _check_reduction("r", r)
    return ConstantSchedule(r)
