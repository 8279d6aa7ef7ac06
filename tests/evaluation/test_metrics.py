"""The shipped metrics against loops over the examples."""

from itertools import product

import numpy as np
import pytest

from dtem_hf.evaluation.metrics import CalibrationError, TopKAccuracy, bootstrap_interval


@pytest.fixture(scope="module")
def accuracy():
    return TopKAccuracy()


@pytest.fixture(scope="module")
def calibration():
    return CalibrationError()


def test_top_k_is_a_label_among_the_k_largest_scores(accuracy):
    draw = np.random.default_rng(0)
    scores, labels = draw.normal(size=(200, 12)), draw.integers(0, 12, 200)
    ranked = np.argsort(-scores, axis=1).astype(np.int32)
    result = accuracy.compute(predictions=ranked, references=labels, k=[1, 3, 5, 12])
    for k in (1, 3, 5, 12):
        hits = 0
        for row, label in zip(scores, labels, strict=True):
            hits += sum(other > row[label] for other in row) < k
        assert result[f"top{k}"] == hits / 200
    assert result["top12"] == 1


def test_batches_add_up_and_too_large_a_k_is_named(accuracy):
    ranked, labels = np.array([[2, 1], [0, 1], [1, 0]], dtype=np.int32), np.array([1, 0, 2])
    for start in range(3):
        accuracy.add_batch(predictions=ranked[start : start + 1], references=labels[start : start + 1])
    assert accuracy.compute(k=2) == {"top2": 2 / 3}
    with pytest.raises(ValueError, match="k=3: 1 to 2, as the predictions rank 2 classes"):
        accuracy.compute(predictions=ranked, references=labels, k=3)


@pytest.mark.parametrize("num_bins", [1, 5, 15])
def test_calibration_error_bin_by_bin(calibration, num_bins):
    draw = np.random.default_rng(1)
    confidence = draw.random(300)
    right = (draw.random(300) < confidence**2).astype(np.int32)
    expected = 0.0
    for i in range(num_bins):
        members = [j for j in range(300) if i / num_bins < confidence[j] <= (i + 1) / num_bins]
        if members:
            gap = np.mean([right[j] for j in members]) - np.mean([confidence[j] for j in members])
            expected += len(members) / 300 * abs(gap)
    result = calibration.compute(predictions=confidence, references=right, num_bins=num_bins)
    assert result["calibration_error"] == pytest.approx(expected, abs=1e-12)


def test_calibration_error_at_the_edges(calibration):
    certain = calibration.compute(predictions=np.ones(4), references=np.array([1, 1, 1, 0]))
    assert certain["calibration_error"] == pytest.approx(0.25)
    # 0.2 of five bins is the end of the first, not the start of the second.
    ends = calibration.compute(predictions=np.array([0.2, 0.1]), references=np.array([0, 0]), num_bins=5)
    assert ends["calibration_error"] == pytest.approx(0.15)
    with pytest.raises(ValueError, match="between 0 and 1"):
        calibration.compute(predictions=np.array([1.5]), references=np.array([1]))


@pytest.mark.parametrize("values", [[0.3, -1.2, 2.5, 0.9, 4.1], [0.0, 0.0, 0.0, 100.0, -100.0], [1.0] * 5], ids=str)
def test_bootstrap_interval_is_that_of_all_resamples(values):
    """Of five values there are 5⁵ equally likely resamples: the bounds leave 2.5 % of their means outside, each."""
    means = np.sort([sum(drawn) / 5 for drawn in product(values, repeat=5)])
    low, high = bootstrap_interval(np.array(values), resamples=20_000)
    assert means[int(0.02 * 5**5)] <= low <= means[int(0.03 * 5**5)]
    assert means[int(0.97 * 5**5)] <= high <= means[int(0.98 * 5**5)]


def test_bootstrap_interval_narrows_as_the_root_of_the_number_of_images():
    values = np.random.default_rng(1).normal(size=6400)
    widths = [np.ptp(bootstrap_interval(values[:count])) for count in (400, 6400)]
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.15)
    assert widths[1] == pytest.approx(2 * 1.96 / 80, rel=0.1)
    assert bootstrap_interval(values) == bootstrap_interval(values)
