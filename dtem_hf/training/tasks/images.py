"""What the tasks on image classifiers have in common: labelled or unlabelled images, and figures of the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...auto import AutoModelForImageClassification
from ...data import ProcessedImages, collate, load_images, load_processor
from ...errors import BadValue
from .base import Task, TaskData, kl_to, unmerged_logits


class ImageTask(Task):
    """Base of tasks whose model maps images to logits."""

    def load_model(self) -> Any:
        a = self.arguments
        return AutoModelForImageClassification.from_pretrained(a.model, merge=a.merge_config())

    def load_data(self, model: Any) -> TaskData:
        a = self.arguments
        processor = load_processor(a.model)
        images = load_images(a.data, a.split)
        if a.validation_data is None:
            if a.validation_size >= len(images):
                raise BadValue(
                    "validation_size", a.validation_size, f"fewer than the {len(images)} images of the data"
                )
            # Drawn by a seed of its own, so that runs with other seeds are compared on the same images.
            parts = images.train_test_split(test_size=a.validation_size, seed=0)
            images, held_out = parts["train"], parts["test"]
        else:
            held_out = load_images(a.validation_data, a.validation_split).shuffle(seed=0)
            held_out = held_out.select(range(min(a.validation_size, len(held_out))))
        options: dict[str, Any] = {"processor": processor, "num_labels": model.config.num_labels, "seed": a.seed}
        return TaskData(
            ProcessedImages(images, augmentation=a.augmentation, **options),
            ProcessedImages(held_out, **options),
            collate,
        )

    def reference(self, plain_model: Any, batch: dict[str, Tensor]) -> Tensor:
        return unmerged_logits(plain_model, batch["pixel_values"])

    def figures(self, model: Any, batch: dict[str, Tensor], reference: Tensor) -> dict[str, Tensor]:
        """KL to the unmerged model (nats), agreement with it and, where labelled, top-1 (%) and cross-entropy."""
        logits, labels = model(pixel_values=batch["pixel_values"]).logits.float(), batch["labels"]
        unlabelled = labels < 0
        best = logits.argmax(-1)
        cross_entropy = F.cross_entropy(logits, labels.clamp(min=0), reduction="none")
        return {
            "kl": kl_to(reference, logits),
            "agreement": 100.0 * (best == reference.argmax(-1)),
            "top1": (100.0 * (best == labels)).masked_fill(unlabelled, torch.nan),
            "cross_entropy": cross_entropy.masked_fill(unlabelled, torch.nan),
        }
