"""Metrics as modules of the `evaluate` library, shipped with the package and loaded by local path.

`evaluate.load("accuracy")` downloads a script; these need no network and change only with the package.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def load_metric(name: str) -> Any:
    """The `evaluate` module of a file in this folder: `top_k_accuracy` or `calibration_error`."""
    library = _evaluate_library()
    return library.load(str(Path(__file__).with_name(f"{name}.py")), keep_in_memory=True)


def _evaluate_library() -> Any:
    """The library, and not `recipes/evaluate.py`, whose folder comes first in the search path of every recipe."""
    path = sys.path[:]
    sys.path[:] = [folder for folder in path if not Path(folder, "evaluate.py").is_file()]
    try:
        import evaluate
    finally:
        sys.path[:] = path
    return evaluate
