"""Top-k accuracy, as a module of the `evaluate` library."""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np


_DESCRIPTION = "The share of examples whose label is among the k classes that the model finds most likely."
_INPUTS = """
Args:
    predictions: classes of each example, the most likely first; at least k of them.
    references: the label of each example.
    k: how many classes count, or a list of such numbers.
Returns:
    {"top1": share between 0 and 1, ...}, one entry for each k.
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class TopKAccuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(
            {"predictions": datasets.Sequence(datasets.Value("int32")), "references": datasets.Value("int32")}
        )
        return evaluate.MetricInfo(
            description=_DESCRIPTION, citation="", inputs_description=_INPUTS, features=features
        )

    def _compute(self, predictions: Any, references: Any, k: int | Sequence[int] = 1) -> dict[str, float]:
        ranked, labels = np.asarray(predictions), np.asarray(references)
        wanted = [k] if isinstance(k, int) else list(k)
        if min(wanted) < 1 or max(wanted) > ranked.shape[1]:
            raise ValueError(f"k={k}: the predictions rank {ranked.shape[1]} classes, so 1 to {ranked.shape[1]}.")
        hits = ranked == labels[:, None]
        return {f"top{n}": float(hits[:, :n].any(axis=1).mean()) for n in wanted}
