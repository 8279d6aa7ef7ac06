"""A plain checkpoint of a small classifier, and a merged one with a learned embedding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dtem_hf import (
    DTEMConfig,
    attach,
)


Make = Callable[..., Any]


@pytest.fixture
def base(make_classifier: Make, tmp_path: Path) -> Path:
    """A plain classifier's checkpoint."""
    make_classifier().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def learned(make_classifier: Make) -> Any:
    """A classifier with a DTEM that is no longer where it started."""
    model = attach(make_classifier(), DTEMConfig(r=9))
    for parameter in model.merge_parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture
def checkpoint(learned: Any, tmp_path: Path) -> Path:
    """Its checkpoint."""
    learned.save_pretrained(tmp_path / "merged")
    return tmp_path / "merged"
