"""Whether autocast is on, and how to turn it off."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def is_autocast_on(device_type: str) -> bool:
    """Whether autocast is on for a device type; "meta" has none."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Turn autocast off inside the block; free of cost if it is off already."""
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
