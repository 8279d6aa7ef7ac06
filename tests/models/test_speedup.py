"""How much to merge for a measured speed-up. The time a pass takes is made up: a machine's own tests nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers import ViTForImageClassification

from dtem_hf import DTEMConfig, EViTConfig, ToMeConfig, attach
from dtem_hf.errors import BadValue
from dtem_hf.models import speedup
from dtem_hf.schedule import FlopsSchedule


Make = Callable[..., ViTForImageClassification]


@pytest.fixture
def exact_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device whose time is the multiply-adds, and a quarter of the plain model's besides."""
    monkeypatch.setattr(speedup, "_speedup", lambda model, *_: 1.25 / (model.merge_plan().ratio + 0.25))


@pytest.mark.usefixtures("exact_device")
@pytest.mark.parametrize("config", [ToMeConfig(r=3), DTEMConfig(r=3)], ids=["tome", "dtem"])
def test_the_least_merging_that_reaches_it_is_kept(make_classifier: Make, config: Any) -> None:
    model = attach(make_classifier().train(), config)
    model.set_reduction(target_speedup=1.4)
    kept = model.merge_config.schedule
    assert isinstance(kept, FlopsSchedule)
    assert speedup._speedup(model, 1, 1) >= 1.4
    assert model.training
    model.set_reduction(flops=kept.flops + 0.01)
    assert speedup._speedup(model, 1, 1) < 1.4


@pytest.mark.usefixtures("exact_device")
def test_what_is_out_of_reach_says_how_far_it_goes_and_changes_nothing(make_classifier: Make) -> None:
    model = attach(make_classifier(), ToMeConfig(r=3))
    with pytest.raises(BadValue, match=r"target_speedup=9.*at most \d\.\d\d.* 16 images.*advise"):
        model.set_reduction(target_speedup=9)
    assert model.merge_config == ToMeConfig(r=3)


@pytest.mark.parametrize("target", [1, 0, -2, float("inf"), float("nan")])
def test_no_speed_up_is_refused(make_classifier: Make, target: float) -> None:
    with pytest.raises(BadValue, match="target_speedup"):
        attach(make_classifier(), ToMeConfig(r=3)).set_reduction(target_speedup=target)


@pytest.mark.parametrize("config", [ToMeConfig(r=9), EViTConfig(0.5)], ids=["tome", "evit"])
def test_a_speed_up_is_measured_on_the_model_itself(make_classifier: Make, config: Any) -> None:
    assert speedup._speedup(attach(make_classifier(), config), batch_size=2, rounds=1) > 0
