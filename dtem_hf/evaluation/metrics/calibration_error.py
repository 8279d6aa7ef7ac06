"""Expected calibration error, as a module of the `evaluate` library (Guo et al., ICML 2017, arXiv 1706.04599)."""

from typing import Any

import datasets
import evaluate
import numpy as np


_DESCRIPTION = "How far a model's confidence is from its accuracy, averaged over bins of equal width of confidence."
_INPUTS = """
Args:
    predictions: the confidence in the class that was chosen, for each example, between 0 and 1.
    references: whether that class was right (1) or wrong (0).
    num_bins: bins of equal width, each open to the left: confidence 0.2 of 5 bins lies in the first.
Returns:
    {"calibration_error": number between 0 and 1}.
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class CalibrationError(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Value("float64"), "references": datasets.Value("int32")})
        return evaluate.MetricInfo(
            description=_DESCRIPTION, citation="", inputs_description=_INPUTS, features=features
        )

    def _compute(self, predictions: Any, references: Any, num_bins: int = 15) -> dict[str, float]:
        confidence, right = np.asarray(predictions, dtype=np.float64), np.asarray(references)
        if confidence.min() < 0 or confidence.max() > 1 + 1e-6:
            raise ValueError(
                f"predictions: confidences lie between 0 and 1, not {confidence.min()} to {confidence.max()}."
            )
        edges = np.linspace(0, 1, num_bins + 1)
        place = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, num_bins - 1)
        gaps = np.bincount(place, weights=right, minlength=num_bins) - np.bincount(
            place, weights=confidence, minlength=num_bins
        )
        return {"calibration_error": float(np.abs(gaps).sum() / len(confidence))}
