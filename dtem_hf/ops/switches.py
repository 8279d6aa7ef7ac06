"""Switches in the environment for what makes merging faster: DTEM_HF_NATIVE and DTEM_HF_TRITON."""

import os

from ..errors import BadValue


def is_on(name: str) -> bool:
    """Whether a switch is on, as it is if nobody says otherwise. Raises ValueError for another value than 0 and 1."""
    value = os.environ.get(name, "1")
    if value not in ("0", "1"):
        raise BadValue(name, value, "0 or 1")
    return value == "1"
