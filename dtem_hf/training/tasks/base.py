"""A task: the loss of a softly merged model on a batch, and what a validation result is ranked by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import BadValue


_TASKS: dict[str, type[Task]] = {}


class Task(ABC):
    """`name` is what the command line calls it; `ranked_by` the validation figure of which lower is better."""

    name: ClassVar[str]
    ranked_by: ClassVar[str]

    def __init_subclass__(cls) -> None:
        _TASKS[cls.name] = cls

    @abstractmethod
    def loss(self, model: Any, plain_model: Any, batch: dict[str, Tensor]) -> Tensor:
        """Mean loss over a batch. `model` is what to run (perhaps wrapped), `plain_model` the merged model in it."""


def task_names() -> list[str]:
    """The names a command line may give."""
    return sorted(_TASKS)


def make_task(name: str) -> Task:
    """The task of a name. Raises ValueError that lists those there are."""
    if name not in _TASKS:
        raise BadValue("task", name, f"one of {', '.join(task_names())}")
    return _TASKS[name]()


@torch.no_grad()
def unmerged_logits(model: Any, pixel_values: Tensor) -> Tensor:
    """What the same model says without merging: [B, classes], float32."""
    with model.unmerged():
        return model(pixel_values=pixel_values).logits.float()


def kl_to(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(reference ‖ model) in nats, per image: logits [B, classes] twice -> [B]."""
    return F.kl_div(logits.float().log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction="none").sum(
        -1
    )
