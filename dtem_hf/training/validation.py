"""How well the hard model does on held-out images, while it is being trained."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch.nn import functional as F
from torch.utils.data import DataLoader

from .tasks.base import kl_to, unmerged_logits


class Validation:
    """Held-out images and what the unmerged model says of them, which is computed once."""

    def __init__(self, accelerator: Accelerator, loader: DataLoader[Any]) -> None:
        self.accelerator = accelerator
        self.loader = accelerator.prepare_data_loader(loader)
        self._references: list[torch.Tensor] = []

    @torch.no_grad()
    def __call__(self, model: Any) -> dict[str, float]:
        """Means over the images: KL to the unmerged model (nats), agreement and, if labelled, top-1 (%), loss."""
        columns: dict[str, list[torch.Tensor]] = {}
        for number, batch in enumerate(self.loader):
            if number == len(self._references):
                self._references.append(unmerged_logits(model, batch["pixel_values"]))
            reference = self._references[number]
            logits = model(pixel_values=batch["pixel_values"]).logits.float()
            labels = batch["labels"]
            known = labels >= 0
            figures = {
                "kl": kl_to(reference, logits),
                "agreement": 100.0 * (logits.argmax(-1) == reference.argmax(-1)),
                "labelled": known.float(),
                "top1": 100.0 * (known & (logits.argmax(-1) == labels)),
                "cross_entropy": known * F.cross_entropy(logits, labels.clamp(min=0), reduction="none"),
            }
            for name, value in figures.items():
                columns.setdefault(name, []).append(self.accelerator.gather_for_metrics(value).cpu())
        means = {name: torch.cat(parts).double().mean().item() for name, parts in columns.items()}
        labelled = means.pop("labelled")
        for name in ("top1", "cross_entropy"):
            value = means.pop(name)
            if labelled > 0:
                means[name] = value / labelled
        return means
