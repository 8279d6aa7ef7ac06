"""The tasks: each is a loss for the merge embedding. Every file in this folder is imported and adds its tasks."""

import sys

from ...discovery import import_all
from .base import Task, make_task, task_names


import_all(sys.modules[__name__])

__all__ = ["Task", "make_task", "task_names"]
