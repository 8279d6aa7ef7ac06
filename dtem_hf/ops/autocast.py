"""Turning autocast off."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Turn autocast off inside the block; free of cost if it is off already. The device type "meta" has none."""
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
