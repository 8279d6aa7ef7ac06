"""Token merging for Hugging Face vision transformers: one keyword makes a model faster; adapters learn to merge."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import Any

from .version import __version__ as __version__


# The stub says where each public name lives. Names are loaded when they are first used, so that `import dtem_hf` costs
# nothing.
_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text("utf-8"))
_HOME_OF = {name.name: line.module for line in _STUB.body if isinstance(line, ast.ImportFrom) for name in line.names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME_OF])


__all__ = sorted(_HOME_OF)
