"""Copies of a model that cost no memory."""

from __future__ import annotations

import copy
from typing import Any


def share_weights(model: Any) -> Any:
    """A copy of a model that shares its parameters and buffers."""
    shared = {id(tensor): tensor for tensors in (model.parameters(), model.buffers()) for tensor in tensors}
    return copy.deepcopy(model, shared)
