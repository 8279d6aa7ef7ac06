"""Exports take long, and as long as a model has layers: here they are of two."""

from pathlib import Path

import pytest


@pytest.fixture
def vit_folder(shallow_vit_folder: Path) -> Path:
    return shallow_vit_folder
