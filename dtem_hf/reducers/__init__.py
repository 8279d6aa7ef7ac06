"""One file per reduction method; a file that is put here is found."""

import sys

from ..discovery import import_all
from .base import Reducer, make_reducer


import_all(sys.modules[__name__])

__all__ = ["Reducer", "make_reducer"]
