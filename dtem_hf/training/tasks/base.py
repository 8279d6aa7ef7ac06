"""The base class of tasks: model, data, loss and validation figures."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import IterableDataset
from torch import Tensor

from ...errors import BadValue
from ...models.install import detach
from ...opening import load_processor
from ..task_arguments import TaskArguments


_TASKS: dict[str, type[Task]] = {}


@dataclass
class TaskData:
    """Training data, validation data, and the function that makes batches of their items.

    Both sets have a length and are indexed by i or (epoch, i); every random draw for an item depends only on these.
    Items hold `index`. If `rows` is a stream, `train` has no length and is indexed by (epoch, number, row). `identity`
    holds digests of the content that was read, by option: a run resumes only with the same data.
    """

    train: Any
    validation: Any
    collate: Callable[[Sequence[Any]], dict[str, Tensor]]
    identity: dict[str, str]
    rows: IterableDataset | None = None
    num_images: int | None = None

    def __post_init__(self) -> None:
        if self.rows is None:
            self.num_images = len(self.train)


class Task(ABC):
    """A training task. `name` is its value of the option `task`.

    `ranked_by` is the validation figure that chooses the best step; lower is better. `soft`: the model merges softly
    in `loss`.
    """

    name: ClassVar[str]
    ranked_by: str
    soft: ClassVar[bool] = True

    def __init_subclass__(cls) -> None:
        if "name" in cls.__dict__:
            _TASKS[cls.name] = cls

    def __init__(self, arguments: TaskArguments) -> None:
        self.arguments = arguments
        self._teacher: Any = None

    @abstractmethod
    def load_model(self) -> Any:
        """The backbone with merging attached."""

    @abstractmethod
    def load_data(self, model: Any) -> TaskData:
        """Load the data. Raises ValueError or FileNotFoundError that names what is wrong."""

    @abstractmethod
    def loss(self, model: Any, plain_model: Any, batch: dict[str, Tensor]) -> Tensor:
        """Mean loss of a batch. `model` runs; it is the merged model `plain_model`, or a wrapper around it."""

    def num_terms(self, batch: dict[str, Tensor]) -> Tensor | None:
        """The number of terms, such as words, over which `loss` is a mean; None if it is the same for all batches."""
        return None

    @abstractmethod
    def reference(self, plain_model: Any, batch: dict[str, Tensor]) -> Any:
        """The unmerged model's output on a validation batch, for `figures`; computed once per run."""

    @abstractmethod
    def figures(self, model: Any, batch: dict[str, Tensor], reference: Any) -> dict[str, Tensor]:
        """Validation figures of the hard model, one value per item, [B]; NaN for an item without the figure."""

    def summarize(self, means: dict[str, float]) -> dict[str, float]:
        """The validation figures of a run, from the means of `figures` over all items."""
        return means

    def keep_teacher(self, model: Any) -> None:
        """Keep an unmerged, frozen copy of a model before its backbone learns; `unmerged` then runs the copy."""
        self._teacher = detach(copy.deepcopy(model)).eval().requires_grad_(False)

    def teacher(self, plain_model: Any) -> Any:
        """The model that `unmerged` runs: the copy of `keep_teacher`, or without one the model itself."""
        return plain_model if self._teacher is None else self._teacher.to(plain_model.device)

    @torch.no_grad()
    def unmerged(self, plain_model: Any, **inputs: Any) -> Any:
        """The output of the unmerged model from before training."""
        if self._teacher is not None:
            return self.teacher(plain_model)(**inputs)
        with plain_model.unmerged():
            return plain_model(**inputs)

    def save_model(self, model: Any, folder: Path) -> None:
        """Write the whole merged model and its image processor into an empty folder."""
        model.save_pretrained(folder)
        load_processor(self.arguments.model).save_pretrained(folder)


def task_names() -> list[str]:
    """The names of all tasks."""
    return sorted(_TASKS)


def make_task(name: str, arguments: TaskArguments) -> Task:
    """Make the task with a name. Raises ValueError that lists all tasks."""
    if name not in _TASKS:
        raise BadValue("task", name, f"one of {', '.join(task_names())}")
    return _TASKS[name](arguments)
