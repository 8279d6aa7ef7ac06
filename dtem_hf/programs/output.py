"""Where a program writes its results."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from .processes import known_processes


def output_folder(path: str | os.PathLike[str]) -> Path:
    """The folder of a program's only file, made before any work.

    Raises OSError where nothing can be written to it, and RuntimeError where the processes of a launch do not know
    each other.
    """
    known_processes()
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        return folder
