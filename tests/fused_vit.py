"""A ViT whose layers run as one call, and the same by its modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dtem_hf.ops import fused_layer


needs_fused_layers = pytest.mark.skipif(
    not fused_layer.is_available(), reason="needs a C compiler, wide vectors and OpenMP"
)
SMALL: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 4,
    "num_labels": 5,
    "initializer_range": 0.1,
}


def by_modules(run: Callable[[], Any]) -> Any:
    """What `run` returns where no layer runs as one call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_layer, "can_run", lambda x: False)
        return run()


def close(found: Tensor, expected: Tensor) -> None:
    """Within what float32 loses when sums are ordered otherwise."""
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
