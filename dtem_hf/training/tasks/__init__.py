"""Training tasks: each defines a loss for the merge embedding. New files in this folder are imported automatically."""

import sys

from ...discovery import import_all
from .base import Task, make_task, task_names


import_all(sys.modules[__name__])

__all__ = ["Task", "make_task", "task_names"]
