"""Base classes of tasks on images: data, and figures of classifiers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F

from ...data.classes import AS_NUMBERS, ClassMap, match_labels
from ...data.images import ProcessedImages, collate, data_digest, first_rows, load_images, num_images, stream_images
from ...errors import BadValue
from ...models.auto import AutoModelForImageClassification, load_trained_classifier
from ...models.distances import kl_to
from ...opening import files_digest, load_processor
from ...programs.identity import digest
from ..mixing import Mixed, mix
from .base import Task, TaskData


class ImageTask(Task):
    """Base of tasks that learn from images, with labels or without.

    Without `needs_labels`, labels that do not fit the model's classes are not used, with a message.
    """

    needs_labels: ClassVar[bool] = False

    def load_data(self, model: Any) -> TaskData:
        a, labels = self.arguments, self.num_labels(model)
        images, rows = None, None
        if a.streaming:
            held_out, rows = self._validation_images(), stream_images(a.data, a.split, a.label_column)
            classes = self._classes(rows, model)
        else:
            images = load_images(a.data, a.split, label_column=a.label_column)
            classes = self._classes(images, model)
            if a.validation_data is None:
                images, held_out = self._split(images)
            else:
                held_out = self._validation_images()
        held_out_classes = self._classes(held_out, model)
        processor = load_processor(a.model)
        options: dict[str, Any] = {"processor": processor, "num_labels": labels, "seed": a.seed}
        identity = {
            "data": _folder_digest(Path(a.data)) if images is None else data_digest(images),
            "validation_data": data_digest(held_out),
            "model's processor": digest(processor.to_dict()),
        }
        return TaskData(
            ProcessedImages(images, augmentation=a.augmentation, classes=classes, **options),
            ProcessedImages(held_out, classes=held_out_classes, **options),
            collate,
            identity,
            rows,
            None if rows is None else num_images(rows, a.split),
        )

    def _classes(self, images: Any, model: Any) -> ClassMap:
        return AS_NUMBERS if self.num_labels(model) is None else match_labels(images, model.config, self.needs_labels)

    def _split(self, images: Dataset) -> tuple[Dataset, Dataset]:
        a = self.arguments
        if a.validation_size >= len(images):
            raise BadValue("validation_size", a.validation_size, f"fewer than the {len(images)} images of the data")
        # A fixed seed, so that runs with different seeds validate on the same images.
        parts = images.train_test_split(test_size=a.validation_size, seed=0)
        return parts["train"], parts["test"]

    def _validation_images(self) -> Dataset:
        a = self.arguments
        if a.validation_data is None:
            raise BadValue(
                "validation_data",
                None,
                "images to validate on (perhaps another split of the same data): a stream cannot hold out images",
            )
        if a.streaming:
            rows = stream_images(a.validation_data, a.validation_split, a.label_column)
            rows = rows.shuffle(seed=0, buffer_size=a.shuffle_buffer)
            return first_rows(rows, a.validation_size, a.validation_data)
        held_out = load_images(a.validation_data, a.validation_split, label_column=a.label_column).shuffle(seed=0)
        return held_out.select(range(min(a.validation_size, len(held_out))))

    def num_labels(self, model: Any) -> int | None:
        """The number of classes; None where labels are not used."""
        return None

    def mixed(self, batch: dict[str, Tensor]) -> Mixed:
        """Mix the batch by mixup or cutmix. The draw depends only on the seed and the batch's first item."""
        a = self.arguments
        key = (a.seed, int(batch["epoch"][0]), int(batch["index"][0])) if a.mixup or a.cutmix else ()
        return mix(batch["pixel_values"], a.mixup, a.cutmix, key)


class ClassifierTask(ImageTask):
    """Base of tasks whose model maps images to logits."""

    def load_model(self) -> Any:
        a = self.arguments
        if self.needs_labels and a.train_backbone:  # a new, random head can learn
            return AutoModelForImageClassification.from_pretrained(a.model, merge=a.merge_config())
        instead = "for an encoder without a head, use --task feature_distillation"
        return load_trained_classifier(a.model, instead, merge=a.merge_config())

    def num_labels(self, model: Any) -> int | None:
        return model.config.num_labels

    def reference(self, plain_model: Any, batch: dict[str, Tensor]) -> Tensor:
        return self.unmerged(plain_model, pixel_values=batch["pixel_values"]).logits.float()

    def figures(self, model: Any, batch: dict[str, Tensor], reference: Tensor) -> dict[str, Tensor]:
        """KL from the unmerged model (nats), agreement with it (%), and with labels top-1 (%) and cross-entropy."""
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


def _folder_digest(folder: Path) -> str:
    """A short hash of the files that a stream may read; for a data set on the Hub, it covers no files."""
    files = sorted(path for path in folder.rglob("[!.]*") if path.is_file())
    return files_digest(((path.relative_to(folder).as_posix(), path) for path in files), len(files))
