"""Validation during training: of the hard model on held-out data, and of both models on one fixed batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from .tasks import Task
from .unreadable_images import IS_REPLACEMENT


class Stopped(Exception):
    """The run was interrupted and must stop."""


class Validation:
    """Held-out data, and the unmerged model's outputs on it, which are computed once.

    All processes call `stopping` before every batch; if it returns true, the validation raises Stopped.
    """

    def __init__(
        self, accelerator: Accelerator, loader: DataLoader[Any], task: Task, stopping: Callable[[], bool]
    ) -> None:
        self.accelerator, self.task, self.stopping = accelerator, task, stopping
        self.loader = accelerator.prepare_data_loader(loader)
        self._references: list[Any] = []
        self._first: Any = None

    @torch.no_grad()
    def __call__(self, model: Any) -> dict[str, float]:
        """The task's figures, each the mean over the items that have it, without figures that no item has."""
        columns: dict[str, list[Tensor]] = {}
        for number, batch in enumerate(self.loader):
            if self.stopping():
                raise Stopped
            if number == len(self._references):
                self._references.append(self.task.reference(model, batch))
            for name, value in self._figures(model, batch, self._references[number]).items():
                columns.setdefault(name, []).append(self.accelerator.gather_for_metrics(value).cpu())
        return self._summary({name: torch.cat(parts) for name, parts in columns.items()})

    @torch.no_grad()
    def glance(self, model: Any, relax: Callable[[bool], None]) -> dict[str, Any]:
        """Figures of the soft and the hard model on the first validation batch, their gap, and effective tokens.

        `relax(soft)` makes the model merge softly or hard, without dropout.
        """
        if self._first is None:
            batch = next(iter(self.loader))
            self.loader.end()  # otherwise accelerate takes this loader as the active one
            self._first = batch, self.task.reference(model, batch)
        batch, reference = self._first
        relax(False)
        hard = self._gathered(self._figures(model, batch, reference))
        relax(True)
        with model.trace_merging() as trace:
            soft = self._gathered(self._figures(model, batch, reference))
        tokens = torch.stack([effective_tokens(sizes).mean() for sizes in trace.sizes])
        tokens = self.accelerator.gather(tokens[None]).double().mean(0)
        gap = {name: hard[name] - soft[name] for name in hard if name in soft}
        return {"glance": {"soft": soft, "hard": hard, "gap": gap}, "tokens": tokens.tolist()}

    def _figures(self, model: Any, batch: dict[str, Tensor], reference: Any) -> dict[str, Tensor]:
        figures = self.task.figures(model, batch, reference)
        replaced = batch.get(IS_REPLACEMENT)
        if replaced is None or not replaced.any():
            return figures
        # An item that replaces an unreadable image must not count twice.
        return {name: value.float().masked_fill(replaced, torch.nan) for name, value in figures.items()}

    def _gathered(self, figures: dict[str, Tensor]) -> dict[str, float]:
        return self._summary({name: self.accelerator.gather(value) for name, value in figures.items()})

    def _summary(self, columns: dict[str, Tensor]) -> dict[str, float]:
        means = {name: values.double().nanmean() for name, values in columns.items()}
        return self.task.summarize({name: value.item() for name, value in means.items() if not value.isnan()})


def effective_tokens(sizes: Tensor) -> Tensor:
    """The effective number of tokens, from their sizes: [B, n] -> [B]. Each token counts min(size, 1).

    After hard merging it is the number of tokens. A token that is half merged away counts one half.
    """
    return sizes.float().clamp(max=1.0).sum(-1)
