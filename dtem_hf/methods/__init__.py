"""One file per reduction method; a file that is put here is found."""

import sys

from ..discovery import import_all
from .base import AttentionInputs, MetricSource, Reducer, make_reducer
from .matching import leave_matched


import_all(sys.modules[__name__])

__all__ = ["AttentionInputs", "MetricSource", "Reducer", "leave_matched", "make_reducer"]
