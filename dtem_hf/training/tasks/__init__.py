"""What a merge embedding is taught by: one file per task; a file that is put here is found."""

import sys

from ...discovery import import_all
from .base import Task, make_task, task_names


import_all(sys.modules[__name__])

__all__ = ["Task", "make_task", "task_names"]
