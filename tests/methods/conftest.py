"""The real DeiT-tiny that the authors' programs were run on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import ViTForImageClassification


@pytest.fixture(scope="session")
def _loaded_deit_tiny(deit_tiny_folder: Path) -> ViTForImageClassification:
    return ViTForImageClassification.from_pretrained(deit_tiny_folder).eval()


@pytest.fixture
def deit_tiny(_loaded_deit_tiny: ViTForImageClassification) -> Callable[[], ViTForImageClassification]:
    """Makes plain copies of it, in `.eval()`."""
    return lambda: copy.deepcopy(_loaded_deit_tiny)
