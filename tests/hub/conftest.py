"""An adapter in a folder, a cache of the Hub, and no network."""

from __future__ import annotations

import socket
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


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reaches for the network fails."""

    def refuse(*_: object) -> None:
        raise AssertionError("a card must be made without the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
