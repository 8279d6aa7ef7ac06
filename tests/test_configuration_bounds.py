"""Every number and list of a config is bounded, so that a file from elsewhere cannot ask for any amount of work."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from dtem_hf import (
    DTEMConfig,
    EViTConfig,
    MergeConfig,
    ToMeConfig,
    attach,
)
from dtem_hf.errors import BadValue
from dtem_hf.schedule import FlopsSchedule, InflectedSchedule, LinearSchedule
from tests.test_configuration import CONFIGS


def numbers_of(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where numbers stand in a config's JSON."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return []
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [found for key, item in items for found in numbers_of(item, (*place, key))]
    return [place]


def with_number(values: dict[str, Any], place: tuple[Any, ...], number: Any) -> dict[str, Any]:
    changed = json.loads(json.dumps(values))
    inner = changed
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = number
    return changed


NUMBERS = [
    (config.to_dict(), place)
    for config in [*CONFIGS, DTEMConfig(embed_dim=8), EViTConfig(0.5, (2, 0)), ToMeConfig(r=InflectedSchedule(8, 1))]
    for place in numbers_of(config.to_dict())
]


@pytest.mark.parametrize("number", [10**400, -(10**400), 1 << 63, 1 << 31, float("inf"), float("nan")], ids=str)
def test_every_number_in_a_config_is_bounded(number: Any) -> None:
    """So that nothing overflows where it is used."""
    assert {place[-1] for _, place in NUMBERS} >= {
        "r",
        "slope",
        "inflection",
        "flops",
        "keep_rate",
        "embed_dim",
        "top_k",
    }
    for values, place in NUMBERS:
        with pytest.raises(BadValue):
            MergeConfig.from_dict(with_number(values, place, number))


@pytest.mark.parametrize("number", [1e-320, 1e-30, 1e30, 1e308])
def test_temperatures_are_bounded(number: float) -> None:
    """By what a similarity can be divided by in float32."""
    for name in ("score_temperature", "assignment_temperature"):
        with pytest.raises(BadValue, match=name):
            DTEMConfig(**{name: number})


def test_lists_are_bounded() -> None:
    for make in (
        lambda: ToMeConfig(r=[1] * 5000),
        lambda: ToMeConfig.from_dict({"r": {"kind": "list", "reductions": [1] * 5000}}),
        lambda: EViTConfig(layers=list(range(5000))),
    ):
        with pytest.raises(BadValue, match="at most 4096"):
            make()


@pytest.mark.parametrize(
    "r",
    [
        1 << 20,
        [1 << 20] * 4,
        LinearSchedule(float(1 << 20), 1),
        LinearSchedule(1 << 20),
        InflectedSchedule(1 << 20, -1),
        InflectedSchedule(1 << 20, 1.0),
        FlopsSchedule(1, 1),
    ],
    ids=str,
)
def test_the_largest_numbers_can_be_used(make_classifier: Callable[..., Any], r: Any) -> None:
    plan = attach(make_classifier(), ToMeConfig(r=r)).merge_plan()
    assert plan.tokens[-1] <= plan.num_tokens == 65


def test_a_number_too_long_to_be_written_is_named_all_the_same() -> None:
    with pytest.raises(BadValue, match="r=<int of too many digits>"):
        ToMeConfig(r=10**5000)
