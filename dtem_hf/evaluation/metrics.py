"""Metrics of the `evaluate` library, shipped with the package: no download, and no folder of HF_HOME."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest


# A recipe's folder comes first in its search path, and has an `evaluate.py` of its own.
_path = sys.path[:]
sys.path[:] = [folder for folder in _path if not Path(folder, "evaluate.py").is_file()]
try:
    import evaluate
finally:
    sys.path[:] = _path


class _LocalMetric(evaluate.Metric):
    """Keeps its examples in memory, and the folder that the library asks for among temporary files."""

    columns: dict[str, Any]

    def __init__(self) -> None:
        self._scratch = TemporaryDirectory()  # removed with the metric
        super().__init__(keep_in_memory=True, cache_dir=self._scratch.name)

    def _info(self) -> evaluate.MetricInfo:
        text = self.__doc__ or ""
        features = datasets.Features(self.columns)
        return evaluate.MetricInfo(description=text, citation="", inputs_description=text, features=features)


class TopKAccuracy(_LocalMetric):
    """The share of examples whose label is among the k classes that the model finds most likely.

    `predictions` are classes of each example, the most likely first; `references` their labels; k a number or a list.
    Returns {"top1": share between 0 and 1, ...}, one entry for each k.
    """

    columns = {"predictions": datasets.Sequence(datasets.Value("int32")), "references": datasets.Value("int32")}

    def _compute(self, predictions: Any, references: Any, k: int | Sequence[int] = 1) -> dict[str, float]:
        ranked, labels = np.asarray(predictions), np.asarray(references)
        wanted = [k] if isinstance(k, int) else list(k)
        if min(wanted) < 1 or max(wanted) > ranked.shape[1]:
            raise ValueError(f"k={k}: the predictions rank {ranked.shape[1]} classes, so 1 to {ranked.shape[1]}.")
        hits = ranked == labels[:, None]
        return {f"top{n}": float(hits[:, :n].any(axis=1).mean()) for n in wanted}


class CalibrationError(_LocalMetric):
    """Expected calibration error: how far confidence is from accuracy, averaged over bins of equal width.

    `predictions` are the confidence in the chosen class of each example, between 0 and 1; `references` whether it was
    right (1) or wrong (0). Each of `num_bins` bins is open to the left: confidence 0.2 of 5 bins lies in the first.
    Source: Guo et al., ICML 2017, arXiv 1706.04599.
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

    Where the values are differences between two models on the same image, the bootstrap is a paired one.
    """
    draw, count = np.random.default_rng(seed), len(values)
    means = [values[draw.integers(count, size=count)].mean() for _ in range(resamples)]
    return np.percentile(means, (2.5, 97.5)).tolist()


def share_interval(count: int, of: int) -> list[float]:
    """The 95 % interval of a share, by Wilson's score: of 0 in 10, [0, 0.28], where a bootstrap would say [0, 0]."""
    return [float(end) for end in binomtest(count, of).proportion_ci(method="wilson")]
