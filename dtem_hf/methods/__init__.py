"""One file per reduction method; a file that is put here is found."""

import sys

from ..discovery import import_all
from .base import MergedLayer, Method, make_method


import_all(sys.modules[__name__])

__all__ = ["MergedLayer", "Method", "make_method"]
