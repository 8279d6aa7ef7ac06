"""One file per reduction method; a file that is put here is found."""

import sys

from ..discovery import import_all
from .base import AttentionInputs, Reducer, make_reducer


import_all(sys.modules[__name__])

__all__ = ["AttentionInputs", "Reducer", "make_reducer"]
