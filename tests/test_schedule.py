"""Schedules against lists worked out by hand; plans against hand counts and torch's own FLOP counter."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from dtem_hf.costs import EncoderCost, LayerCost, MetricCost
from dtem_hf.errors import BadValue
from dtem_hf.schedule import (
    ConstantSchedule,
    FlopsSchedule,
    InflectedSchedule,
    KeepRateSchedule,
    LinearSchedule,
    ListSchedule,
    Schedule,
    as_schedule,
)


def encoder(num_layers: int, prefix: int = 1) -> EncoderCost:
    """Round numbers, with a metric that costs something."""
    layer = LayerCost(before=400, per_pair=20, after=800, metric=MetricCost(per_token=50, per_image=30, width=5))
    return EncoderCost((layer,) * num_layers, stem=300, head=1000, num_prefix_tokens=prefix)


@pytest.mark.parametrize(
    "schedule, num_layers, expected",
    [
        (ConstantSchedule(16), 3, [16, 16, 16]),
        (ConstantSchedule(0), 2, [0, 0]),
        (ListSchedule((3, 0, 5)), 3, [3, 0, 5]),
        # ToMe's own: r (1 - inflection) at the start, r (1 + inflection) at the end, truncated.
        (InflectedSchedule(8, -1.0), 5, [16, 12, 8, 4, 0]),
        (InflectedSchedule(8, 1.0), 5, [0, 4, 8, 12, 16]),
        (InflectedSchedule(8, 0.0), 5, [8, 8, 8, 8, 8]),
        (InflectedSchedule(16), 12, [32, 29, 26, 23, 20, 17, 14, 11, 8, 5, 2, 0]),
        (InflectedSchedule(5, 0.5), 4, [2, 4, 6, 8]),
        (InflectedSchedule(8, -1.0), 1, [16]),
        # Weights 1.5, 1.25, 1, 0.75, 0.5 of 20; then 2, 4/3, 2/3, 0 of 8, rounded so that they add up.
        (LinearSchedule(4), 5, [6, 5, 4, 3, 2]),
        (LinearSchedule(2, slope=1.0), 4, [4, 3, 1, 0]),
        (LinearSchedule(1.5, slope=0.0), 4, [2, 1, 2, 1]),
        (LinearSchedule(7), 1, [7]),
        # 999 patches: 500 stay and 499 become one token; of 501, 251 and one; of 252, 126 and one.
        (KeepRateSchedule(0.5), 12, [0, 0, 0, 498, 0, 0, 249, 0, 0, 125, 0, 0]),
        (KeepRateSchedule(0.5, (2, 0)), 3, [498, 0, 249]),
        (KeepRateSchedule(0.5), 3, [498, 249, 125]),
        (KeepRateSchedule(0.5), 1, [498]),
        (KeepRateSchedule(0.001, (1,)), 2, [0, 997]),
        (KeepRateSchedule(0.999, (1,)), 2, [0, 0]),  # one token fused into one would save nothing
        (KeepRateSchedule(0.997, (1,)), 2, [0, 1]),
        (KeepRateSchedule(1.0), 4, [0, 0, 0, 0]),
        (KeepRateSchedule(0.5, ()), 2, [0, 0]),
    ],
    ids=str,
)
def test_schedules_equal_lists_worked_out_by_hand(schedule: Schedule, num_layers: int, expected: list[int]) -> None:
    assert schedule.resolve(encoder(num_layers), 1000) == expected


@pytest.mark.parametrize("r", [0, 0.5, 3, 7.25, 16])
@pytest.mark.parametrize("slope", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("num_layers", [1, 2, 12, 24])
def test_linear_schedule_has_its_mean_and_never_rises_by_more_than_rounding(
    r: float, slope: float, num_layers: int
) -> None:
    reductions = LinearSchedule(r, slope).resolve(encoder(num_layers), 1000)
    assert sum(reductions) == round(r * num_layers)
    assert all(later <= earlier + 1 for earlier, later in pairwise(reductions))
    assert min(reductions) >= 0


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_clamping_takes_at_most_half_of_what_is_free(prefix: int) -> None:
    # 20 free tokens: half of 20, of 10, of 5, of 3, of 2, of 1.
    for wanted, free, taken in (
        ([50] * 6, 20, [10, 5, 2, 1, 1, 0]),
        ([4, 0, 7, 50], 20, [4, 0, 7, 4]),
        ([3, 3], 0, [0, 0]),
    ):
        assert encoder(len(wanted), prefix).plan(free + prefix, wanted).reductions == taken


def spread_evenly(total: int, num_layers: int) -> list[int]:
    """Layers 0 to i merge round(total (i + 1) / layers) tokens, halves upwards."""
    upto = [0, *((2 * total * (i + 1) + num_layers) // (2 * num_layers) for i in range(num_layers))]
    return [later - earlier for earlier, later in pairwise(upto)]


@pytest.mark.parametrize("num_layers, num_tokens", [(4, 65), (12, 197), (3, 33)])
@pytest.mark.parametrize("flops", [0.999, 0.9, 0.75, 0.65, 0.5])
def test_flops_schedule_merges_the_fewest_tokens_that_meet_the_share(
    num_layers: int, num_tokens: int, flops: float
) -> None:
    """Against trying every number of merged tokens in turn."""
    cost = encoder(num_layers)
    found = FlopsSchedule(flops).resolve(cost, num_tokens)
    assert cost.plan(num_tokens, found).ratio <= flops
    total = 0
    while cost.plan(num_tokens, spread_evenly(total, num_layers)).ratio > flops:
        total += 1
    assert found == spread_evenly(total, num_layers)


@pytest.mark.parametrize("slope", [0.25, 1.0])
@pytest.mark.parametrize("flops", [0.9, 0.65, 0.5])
def test_sloped_flops_schedule_meets_the_share_by_merging_more_at_the_start(slope: float, flops: float) -> None:
    cost = encoder(12)
    sloped = FlopsSchedule(flops, slope).resolve(cost, 197)
    assert cost.plan(197, sloped).ratio <= flops
    one_fewer = LinearSchedule((sum(sloped) - 1) / 12, slope).resolve(cost, 197)
    assert cost.plan(197, one_fewer).ratio > flops
    assert sum(sloped) < sum(FlopsSchedule(flops).resolve(cost, 197))
    assert sloped[0] > sloped[-1]


def test_all_of_the_flops_merges_nothing() -> None:
    assert FlopsSchedule(1.0).resolve(encoder(4), 65) == [0, 0, 0, 0]


def test_a_share_that_cannot_be_met_says_what_can() -> None:
    with pytest.raises(BadValue, match=r"flops=0\.01: merging everything still leaves 0\.\d+ of the multiply-adds"):
        FlopsSchedule(0.01).resolve(encoder(4), 65)


@pytest.mark.parametrize(
    "make, field, value, expected",
    [
        (lambda v: ConstantSchedule(v), "r", -1, "from 0"),
        (lambda v: ConstantSchedule(v), "r", 2.0, "whole number"),
        (lambda v: ConstantSchedule(v), "r", True, "whole number"),
        (lambda v: ListSchedule((1, v)), "r[1]", -3, "from 0"),
        (lambda v: ListSchedule((v, 1)), "r[0]", "8", "whole number"),
        (lambda v: LinearSchedule(v), "r", -0.5, "from 0"),
        (lambda v: LinearSchedule(v), "r", float("nan"), "from 0"),
        (lambda v: LinearSchedule(v), "r", float("inf"), "from 0"),
        (lambda v: LinearSchedule(4, v), "slope", 1.1, "0 to 1"),
        (lambda v: LinearSchedule(4, v), "slope", -0.1, "0 to 1"),
        (lambda v: LinearSchedule(4, v), "slope", "steep", "0 to 1"),
        (lambda v: InflectedSchedule(v), "r", 1.5, "whole number"),
        (lambda v: InflectedSchedule(8, v), "inflection", -1.5, "-1 to 1"),
        (lambda v: InflectedSchedule(8, v), "inflection", 2, "-1 to 1"),
        (lambda v: FlopsSchedule(v), "flops", 1.5, "to 1"),
        (lambda v: FlopsSchedule(v), "flops", -0.5, "to 1"),
        (lambda v: FlopsSchedule(v), "flops", 0, "to 1"),
        (lambda v: FlopsSchedule(v), "flops", float("nan"), "to 1"),
        (lambda v: FlopsSchedule(v), "flops", False, "to 1"),
        (lambda v: FlopsSchedule(0.5, v), "slope", 3, "0 to 1"),
        (lambda v: KeepRateSchedule(v), "keep_rate", 0, "above 0, up to 1"),
        (lambda v: KeepRateSchedule(v), "keep_rate", 1.5, "to 1"),
        (lambda v: KeepRateSchedule(v), "keep_rate", -0.5, "to 1"),
        (lambda v: KeepRateSchedule(v), "keep_rate", float("nan"), "to 1"),
        (lambda v: KeepRateSchedule(v), "keep_rate", True, "to 1"),
        (lambda v: KeepRateSchedule(v), "keep_rate", "0.7", "to 1"),
        (lambda v: KeepRateSchedule(0.7, v), "layers", 3, "a list of at most 4096 whole numbers"),
        (lambda v: KeepRateSchedule(0.7, v), "layers", "3, 6", "a list of at most 4096 whole numbers"),
        (lambda v: KeepRateSchedule(0.7, v), "layers", [3, 6, 3], "each layer once"),
    ],
)
def test_bad_values_name_the_field_the_value_and_what_fits(
    make: Callable[[Any], Schedule], field: str, value: Any, expected: str
) -> None:
    with pytest.raises(ValueError) as raised:
        make(value)
    message = str(raised.value)
    assert message.startswith(f"{field}={value!r}: ")
    assert expected in message


def test_a_list_for_another_number_of_layers_names_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"r=\[1, 2, 3\]: 3 layers and the model has 4"):
        ListSchedule((1, 2, 3)).resolve(encoder(4), 65)


@pytest.mark.parametrize("layers", [(4,), (0, 7)], ids=str)
def test_a_keep_rate_for_layers_that_are_not_there_says_which_are(layers: tuple[int, ...]) -> None:
    with pytest.raises(BadValue, match=r"layers=\[.*\]: layers from 0 to 3, as the model has 4"):
        KeepRateSchedule(0.7, layers).resolve(encoder(4), 65)


@pytest.mark.parametrize("value", [-1, 1.0, True, "1", None], ids=repr)
def test_a_bad_layer_is_named_by_its_place(value: Any) -> None:
    with pytest.raises(BadValue, match=r"layers\[1\]=.*a whole number from 0 to 4095"):
        KeepRateSchedule(0.7, (0, value))


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 17, 197])
@pytest.mark.parametrize("prefix", [1, 2, 5])
@pytest.mark.parametrize("keep_rate", [0.01, 0.3, 0.5, 0.7, 0.99])
def test_a_keep_rate_counted_by_loops(keep_rate: float, prefix: int, num_tokens: int) -> None:
    """Also for no more tokens than prefix tokens, where there is nothing to fuse."""
    reductions = KeepRateSchedule(keep_rate, (0, 2)).resolve(encoder(3, prefix), num_tokens)
    patches = num_tokens - prefix
    for layer, r in enumerate(reductions):
        kept = 0
        while kept < keep_rate * patches - 1e-9 and layer in (0, 2):
            kept += 1
        others = patches - kept if layer in (0, 2) else 0
        assert r == (others - 1 if others > 1 else 0)
        patches -= r


@pytest.mark.parametrize("layers", [None, (0,), (10,), (2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("flops", [1.0, 0.99, 0.9, 0.65, 0.5])
def test_the_highest_keep_rate_that_meets_the_share(flops: float, layers: tuple[int, ...] | None) -> None:
    """Against the ratios of all thousandths."""
    cost = encoder(12)
    ratios = {}
    for thousandths in range(1, 1001):
        schedule = KeepRateSchedule(thousandths / 1000, layers)
        ratios[thousandths] = cost.plan(197, schedule.resolve(cost, 197)).ratio
    fitting = [thousandths for thousandths, ratio in ratios.items() if ratio <= flops]
    if fitting:
        expected = KeepRateSchedule(max(fitting) / 1000, layers)
        assert KeepRateSchedule(0.123, layers).for_flops(cost, 197, flops) == expected
    else:
        with pytest.raises(BadValue, match=rf"flops={flops}: more, or reduce in more or earlier layers"):
            KeepRateSchedule(0.123, layers).for_flops(cost, 197, flops)


@pytest.mark.parametrize(
    "schedule",
    [
        ConstantSchedule(7),
        ListSchedule((1, 2, 3)),
        LinearSchedule(4.5, 0.25),
        InflectedSchedule(8, 0.5),
        FlopsSchedule(0.65, 0.5),
        KeepRateSchedule(0.7),
        KeepRateSchedule(0.7, (2, 5)),
    ],
    ids=str,
)
def test_schedules_survive_json(schedule: Schedule) -> None:
    assert as_schedule(json.loads(json.dumps(schedule.to_json()))) == schedule
    assert as_schedule(schedule) is schedule


@pytest.mark.parametrize(
    "value, expected",
    [
        ({"kind": "zigzag", "r": 3}, "constant, flops, inflected, keep_rate, linear, list"),
        ({"r": 3}, "constant, flops, inflected, keep_rate, linear, list"),
        ({"kind": "linear"}, "r, slope"),
        ({"kind": "linear", "r": 3, "slop": 1}, "r, slope"),
        ("16", "whole number"),
        (None, "whole number"),
        (16.0, "whole number"),
    ],
    ids=str,
)
def test_what_is_no_schedule_is_refused_with_what_would_be(value: Any, expected: str) -> None:
    with pytest.raises(BadValue) as raised:
        as_schedule(value)
    assert raised.value.field == "r"
    assert expected in str(raised.value)


@pytest.mark.parametrize("r", ["16", 1.5, True, None])
def test_what_r_may_be_is_said_in_full(r):
    with pytest.raises(BadValue, match="a whole number, or a list with one for each layer, or a schedule such as"):
        as_schedule(r)
