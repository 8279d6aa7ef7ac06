"""A task: the model and the data it needs, the loss of a softly merged model, and how well the hard one does."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from datasets import IterableDataset
from torch import Tensor

from ...data.images import load_processor
from ...errors import BadValue
from ...models.install import detach


if TYPE_CHECKING:
    from ..arguments import TrainArguments


_TASKS: dict[str, type[Task]] = {}


@dataclass
class TaskData:
    """What a run learns from and is validated on.

    The sets have a length and are indexed by i, or by (epoch, i) so that what is drawn for an item depends on nothing
    else; their items hold `index`. `collate` makes a batch, a dict of tensors, of items. Where `rows` is a stream,
    `train` has no length and is indexed by (epoch, number, row).
    """

    train: Any
    validation: Any
    collate: Callable[[Sequence[Any]], dict[str, Tensor]]
    rows: IterableDataset | None = None
    num_images: int | None = None

    def __post_init__(self) -> None:
        if self.rows is None:
            self.num_images = len(self.train)


class Task(ABC):
    """`name` is what the command line calls it; `ranked_by` the validation figure of which lower is better.

    `soft` says whether the model merges softly when `loss` runs it.
    """

    name: ClassVar[str]
    ranked_by: str
    soft: ClassVar[bool] = True

    def __init_subclass__(cls) -> None:
        if "name" in cls.__dict__:
            _TASKS[cls.name] = cls

    def __init__(self, arguments: TrainArguments) -> None:
        self.arguments = arguments
        self._teacher: Any = None

    @abstractmethod
    def load_model(self) -> Any:
        """The backbone with merging attached."""

    @abstractmethod
    def load_data(self, model: Any) -> TaskData:
        """Raises ValueError or FileNotFoundError that names what is wrong with the data."""

    @abstractmethod
    def loss(self, model: Any, plain_model: Any, batch: dict[str, Tensor]) -> Tensor:
        """Mean loss over a batch. `model` is what to run (perhaps wrapped), `plain_model` the merged model in it."""

    @abstractmethod
    def reference(self, plain_model: Any, batch: dict[str, Tensor]) -> Any:
        """What the unmerged model makes of a validation batch, for `figures`; computed once for a run."""

    @abstractmethod
    def figures(self, model: Any, batch: dict[str, Tensor], reference: Any) -> dict[str, Tensor]:
        """Validation figures of the hard model, each [B] with one value per item; NaN where an item has none."""

    def summarize(self, means: dict[str, float]) -> dict[str, float]:
        """The figures' means over all items, and what is computed from them."""
        return means

    def keep_teacher(self, model: Any) -> None:
        """Copy a model, unmerged and frozen, before its backbone learns: `unmerged` then runs the copy."""
        self._teacher = detach(copy.deepcopy(model)).eval().requires_grad_(False)

    def teacher(self, plain_model: Any) -> Any:
        """The model that `unmerged` runs: the copy where the backbone learns, or else the model itself."""
        return plain_model if self._teacher is None else self._teacher.to(plain_model.device)

    @torch.no_grad()
    def unmerged(self, plain_model: Any, **inputs: Any) -> Any:
        """What the model that training began with puts out without merging."""
        if self._teacher is not None:
            return self.teacher(plain_model)(**inputs)
        with plain_model.unmerged():
            return plain_model(**inputs)

    def save_model(self, model: Any, folder: Path) -> None:
        """Write the whole merged model, with what it takes to feed it, into an empty folder."""
        model.save_pretrained(folder)
        load_processor(self.arguments.model).save_pretrained(folder)


def task_names() -> list[str]:
    """The names a command line may give."""
    return sorted(_TASKS)


def make_task(arguments: TrainArguments) -> Task:
    """The task that is asked for. Raises ValueError that lists those there are."""
    if arguments.task not in _TASKS:
        raise BadValue("task", arguments.task, f"one of {', '.join(task_names())}")
    return _TASKS[arguments.task](arguments)
