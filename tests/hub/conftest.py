"""An adapter in a folder, and a cache of the Hub."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.adapters import make_adapter


@pytest.fixture
def cache(tmp_path: Path) -> dict[str, str]:
    """A cache in which nothing is yet."""
    return {"cache_dir": str(tmp_path / "cache")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_adapter().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"
