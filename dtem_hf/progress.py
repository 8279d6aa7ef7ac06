"""Progress bars in terminals and notebooks; none in a log or a pipe."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm as _tqdm


def are_shown() -> bool:
    """Whether to draw bars: stderr is a terminal, or a notebook is running."""
    if sys.stderr.isatty():
        return True
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and "IPKernelApp" in shell.config


def tqdm(*args: Any, disable: bool = False, **options: Any) -> Any:
    """A tqdm bar, hidden unless `are_shown`."""
    return _tqdm(*args, disable=disable or not are_shown(), **options)


def hide_other_bars() -> None:
    """Hide the bars of transformers and huggingface_hub unless `are_shown`."""
    from transformers.utils import logging

    if not are_shown():
        logging.disable_progress_bar()
