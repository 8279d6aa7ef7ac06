"""Metrics for the `evaluate` library, as part of this package: no download, and no folder in HF_HOME."""

from __future__ import annotations

from collections.abc import Sequence
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from ..errors import import_past_scripts


import_past_scripts("evaluate")
import evaluate  # noqa: E402


class _LocalMetric(evaluate.Metric):
    """A metric that keeps its examples in memory; the folder that the library needs is a temporary one."""

    columns: dict[str, Any]

    def __init__(self) -> None:
        self._scratch = TemporaryDirectory()  # deleted together with the metric
        super().__init__(keep_in_memory=True, cache_dir=self._scratch.name)

    def _info(self) -> evaluate.MetricInfo:
        text = self.__doc__ or ""
        features = datasets.Features(self.columns)
        return evaluate.MetricInfo(description=text, citation="", inputs_description=text, features=features)


class TopKAccuracy(_LocalMetric):
    """The share of examples whose label is among the k most likely classes.

    `predictions` are the classes of each example, the most likely first; `references` are the labels; k is a number or
    a list. Returns {"top1": share between 0 and 1, ...}, one entry for each k.
    """

    columns = {"predictions": datasets.Sequence(datasets.Value("int32")), "references": datasets.Value("int32")}

    def _compute(self, predictions: Any, references: Any, k: int | Sequence[int] = 1) -> dict[str, float]:
        ranked, labels = np.asarray(predictions), np.asarray(references)
        wanted = [k] if isinstance(k, int) else list(k)
        if min(wanted) < 1 or max(wanted) > ranked.shape[1]:
            raise ValueError(f"k={k}: 1 to {ranked.shape[1]}, as the predictions rank {ranked.shape[1]} classes.")
        hits = ranked == labels[:, None]
        return {f"top{n}": float(hits[:, :n].any(axis=1).mean()) for n in wanted}


class CalibrationError(_LocalMetric):
    """Expected calibration error: the distance of confidence from accuracy, averaged over bins of equal width.

    `predictions` are the confidences in the chosen classes, between 0 and 1; `references` are 1 for right and 0 for
    wrong. Each of `num_bins` bins is open to the left: with 5 bins, confidence 0.2 is in the first. Source: Guo et
    al., ICML 2017, arXiv 1706.04599.
    """

    columns = {"predictions": datasets.Value("float64"), "references": datasets.Value("int32")}

    def _compute(self, predictions: Any, references: Any, num_bins: int = 15) -> dict[str, float]:
        confidence, right = np.asarray(predictions, dtype=np.float64), np.asarray(references)
        low, high = confidence.min(), confidence.max()
        if low < 0 or high > 1 + 1e-6:
            raise ValueError(f"predictions: confidences lie between 0 and 1, not {low} to {high}.")
        edges = np.linspace(0, 1, num_bins + 1)
        place = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, num_bins - 1)
        hits, sure = (np.bincount(place, weights=values, minlength=num_bins) for values in (right, confidence))
        return {"calibration_error": float(np.abs(hits - sure).sum() / len(confidence))}


def bootstrap_interval(values: NDArray[Any], resamples: int = 2000, seed: int = 0) -> list[float]:
    """The 95 % interval of a mean over images, by the percentile bootstrap: values [n] -> [low, high].

    If the values are differences between two models on the same images, this is a paired bootstrap.
    """
    draw, count = np.random.default_rng(seed), len(values)
    means = [values[draw.integers(count, size=count)].mean() for _ in range(resamples)]
    return np.percentile(means, (2.5, 97.5)).tolist()


def share_interval(count: int, of: int) -> list[float]:
    """The 95 % interval of a share, by Wilson's score: for 0 of 10 it is [0, 0.28]; a bootstrap would give [0, 0]."""
    return [float(end) for end in binomtest(count, of).proportion_ci(method="wilson")]
