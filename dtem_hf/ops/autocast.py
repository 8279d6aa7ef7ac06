"""Where autocast is on, and how to do without it."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def is_autocast_on(device_type: str) -> bool:
    """Whether autocast is on for a kind of device; some, such as "meta", have none."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Autocast off, at no cost where it is off already."""
    return torch.autocast(device_type, enabled=False) if is_autocast_on(device_type) else nullcontext()
