"""Metrics as modules of the `evaluate` library, shipped with the package: no download, and no folder of HF_HOME."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple


class Metrics(NamedTuple):
    """What a classifier's figures are computed by."""

    accuracy: Any
    calibration: Any


def load_metrics() -> Metrics:
    """Top-k accuracy and calibration error, ready to compute."""
    return Metrics(load_metric("TopKAccuracy"), load_metric("CalibrationError"))


def load_metric(name: str) -> Any:
    """An instance of a metric in this folder: `TopKAccuracy` or `CalibrationError`."""
    _import_library()
    file = {"TopKAccuracy": "top_k_accuracy", "CalibrationError": "calibration_error"}[name]
    scratch = TemporaryDirectory()
    metric = getattr(import_module(f".{file}", __package__), name)(keep_in_memory=True, cache_dir=scratch.name)
    metric.scratch = scratch  # removed with it
    return metric


def _import_library() -> None:
    """Import the library `evaluate`, not `recipes/evaluate.py`, which comes first in the search path of a recipe."""
    path = sys.path[:]
    sys.path[:] = [folder for folder in path if not Path(folder, "evaluate.py").is_file()]
    try:
        import evaluate  # noqa: F401
    finally:
        sys.path[:] = path
