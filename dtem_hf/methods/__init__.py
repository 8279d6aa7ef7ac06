"""Reduction methods, one per file. New files in this folder are imported automatically."""

import sys

from ..discovery import import_all
from .base import Method, make_method


import_all(sys.modules[__name__])

__all__ = ["Method", "make_method"]
