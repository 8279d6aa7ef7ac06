"""How well the hard model does on held-out data, while it is being trained."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from .tasks import Task


class Validation:
    """Held-out data and what the unmerged model makes of it, which is computed once."""

    def __init__(self, accelerator: Accelerator, loader: DataLoader[Any], task: Task) -> None:
        self.accelerator, self.task = accelerator, task
        self.loader = accelerator.prepare_data_loader(loader)
        self._references: list[Any] = []

    @torch.no_grad()
    def __call__(self, model: Any) -> dict[str, float]:
        """The task's figures, each a mean over the items that have it; left out where none has."""
        columns: dict[str, list[torch.Tensor]] = {}
        for number, batch in enumerate(self.loader):
            if number == len(self._references):
                self._references.append(self.task.reference(model, batch))
            for name, value in self.task.figures(model, batch, self._references[number]).items():
                columns.setdefault(name, []).append(self.accelerator.gather_for_metrics(value).cpu())
        means = {name: torch.cat(parts).double().nanmean() for name, parts in columns.items()}
        return self.task.summarize({name: value.item() for name, value in means.items() if not value.isnan()})
