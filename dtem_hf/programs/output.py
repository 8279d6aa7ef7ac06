"""Where a program writes its results."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def output_folder(path: str | os.PathLike[str]) -> Path:
    """The folder of a program's results, made before any work. Raises OSError where nothing can be written to it."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        return folder
