"""Task `classification`: cross-entropy with the data's labels, mixed like the images (docs/method.md section 5)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from ...errors import BadValue
from ...models.distances import kl_to
from ..mixing import soft_targets
from .image_task import ClassifierTask


class Classification(ClassifierTask):
    """Every image needs a label. With `train_backbone`, the model may lack a head.

    The loss adds `distillation_weight` times the KL divergence from the unmerged model.
    """

    name: ClassVar[str] = "classification"
    ranked_by = "cross_entropy"
    needs_labels: ClassVar[bool] = True

    def loss(self, model: Any, plain_model: Any, batch: dict[str, Tensor]) -> Tensor:
        unlabelled = batch["index"][batch["labels"] < 0]
        if len(unlabelled):
            right = f"image {int(unlabelled[0])} has no label; label it, or use task distillation"
            raise BadValue("task", self.name, right)
        mixed = self.mixed(batch)
        logits = model(pixel_values=mixed.pixel_values).logits.float()
        targets, a = soft_targets(batch["labels"], mixed, logits.shape[-1]), self.arguments
        loss = F.cross_entropy(logits, targets, label_smoothing=a.label_smoothing)
        if not a.distillation_weight:
            return loss
        target = self.unmerged(plain_model, pixel_values=mixed.pixel_values).logits.float()
        return loss + a.distillation_weight * kl_to(target, logits).mean()
