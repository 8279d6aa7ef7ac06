"""Runs of the evaluation programs: their command lines, and what happens to their batches."""

from __future__ import annotations

from typing import Any

import pytest


def flags(options: dict[str, Any], **changes: Any) -> list[str]:
    """Options as a command line; a list is one option with several words."""
    values = {name: value for name, value in {**options, **changes}.items() if value is not None}
    lists = {name: value for name, value in values.items() if isinstance(value, list)}
    single = [f"--{name}={value}" for name, value in values.items() if name not in lists]
    return [*single, *(word for name, value in lists.items() for word in (f"--{name}", *map(str, value)))]


def watch(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, stop_behind: int | None = None) -> list[Any]:
    """The batches that `module.name` measures from now on; behind some of them the run is interrupted."""
    real, seen = getattr(module, name), list[Any]()

    def measure(*args: Any, **options: Any) -> Any:
        if len(seen) == stop_behind:
            raise KeyboardInterrupt
        seen.append(next(each for each in args if isinstance(each, dict) and "pixel_values" in each))
        return real(*args, **options)

    monkeypatch.setattr(module, name, measure)
    return seen
