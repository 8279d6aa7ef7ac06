"""Costs against counts by hand, and timings by runs whose order and arithmetic are known."""

import statistics

import numpy as np
import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from dtem_hf import BadValue, ToMeConfig, attach
from dtem_hf.benchmark.efficiency import (
    break_even,
    count_multiply_adds,
    peak_memory,
    speeds,
    spread,
)
from dtem_hf.models.timing import time_interleaved


CPU = torch.device("cpu")


def multiply_adds_by_hand(width, layers=12, tokens=197, patches=196, patch=16, classes=1000):
    """Patch embedding, then per layer q, k, v and output (4 w²), MLP (8 w²) and attention (2 n w), then the head."""
    stem = patches * 3 * patch * patch * width
    layer = tokens * (4 * width**2 + 8 * width**2) + 2 * tokens**2 * width
    return stem + layers * layer + width * classes


@pytest.mark.parametrize(("heads", "published"), [(3, 1.26), (6, 4.60), (12, 17.6)])
def test_multiply_adds_of_deit_are_those_counted_by_hand_and_published(heads, published):
    width = 64 * heads
    with torch.device("meta"):
        config = ViTConfig(hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width, num_labels=1000)
        model = ViTForImageClassification(config).eval()
        counted = count_multiply_adds(lambda: model(torch.zeros(1, 3, 224, 224)))
    assert counted == multiply_adds_by_hand(width)
    assert counted / 1e9 == pytest.approx(published, rel=0.006)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_multiply_adds_of_a_merged_model_are_those_of_its_plan(make_classifier, attention):
    """On this device SDPA is one kernel, which the counter would leave out."""
    model = attach(make_classifier(attn_implementation=attention), ToMeConfig(r=6))
    pixels = torch.zeros(2, 3, 32, 32)
    assert count_multiply_adds(lambda: model(pixels)) == 2 * model.merge_plan().multiply_adds


def test_peak_memory_is_the_worst_moment_of_a_known_program():
    x = torch.ones(1000, 1000)

    def run():
        y = x + 1  # 4 MB
        z = y + 1  # and 4 MB more: 8 MB
        del y
        return z.repeat(1, 3)  # 4 MB and 12 MB: the worst moment

    assert peak_memory(run, CPU) == pytest.approx(16e6, abs=1000)
    assert peak_memory(lambda: None, CPU) == 0


def test_runs_are_interleaved_behind_the_warm_up():
    order = []
    seconds = time_interleaved([lambda: order.append("a"), lambda: order.append("b")], CPU, rounds=3, warmup=2)
    assert "".join(order) == "ab" * 5
    assert seconds.shape == (3, 2) and (seconds > 0).all()
    order.clear()
    time_interleaved([lambda: order.append("a"), lambda: order.append("b")], CPU, rounds=1, warmup=1, batch_size=3)
    assert "".join(order) == "aaabbb" * 2  # three calls on 3 images, so that a run is never one short call
    for name, value in (("rounds", 0), ("warmup", -1)):
        with pytest.raises(BadValue, match=f"{name}={value}"):
            time_interleaved([lambda: None], CPU, **{"rounds": 1, "warmup": 0, name: value})


def test_speeds_are_medians_of_rounds_and_speedups_of_ratios_within_them():
    seconds = np.random.default_rng(0).uniform(0.1, 0.3, size=(7, 3))
    rows = speeds(seconds, 4, references=[0, 0, 0])
    for i, row in enumerate(rows):
        ratios = [seconds[j, 0] / seconds[j, i] for j in range(7)]
        assert row["images_per_second"]["median"] == pytest.approx(4 / statistics.median(seconds[:, i]))
        assert row["speedup"]["median"] == pytest.approx(statistics.median(ratios))
        assert row["speedup"]["q25"] == pytest.approx((sorted(ratios)[1] + sorted(ratios)[2]) / 2)
    assert rows[0]["speedup"] == {"median": 1, "q25": 1, "q75": 1}
    compared = speeds(seconds, 4, references=[0, 1, 1])
    assert [row["speedup"]["median"] for row in compared] == pytest.approx(
        [1, 1, statistics.median(seconds[:, 1] / seconds[:, 2])]
    )
    assert spread([1, 2, 3, np.nan, 4, 5]) == {"median": 3, "q25": 2, "q75": 4}


def test_break_even_is_where_it_starts_to_pay_and_goes_on_paying():
    draw = np.random.default_rng(0)
    for _ in range(200):
        measured = {size: float(draw.uniform(0.5, 1.5)) for size in (1, 4, 16, 64)}
        paying = [size for size in measured if all(measured[other] >= 1 for other in measured if other >= size)]
        assert break_even(measured) == min(paying, default=None)
