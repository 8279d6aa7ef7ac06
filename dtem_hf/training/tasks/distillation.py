"""Task `distillation`: without labels, a merged classifier learns the logits of the unmerged model."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ...models.distances import feature_distance, kl_to, recorded_features
from .image_task import ClassifierTask


class Distillation(ClassifierTask):
    """The loss is the KL divergence from the unmerged logits, plus `feature_weight` times a feature distance."""

    name: ClassVar[str] = "distillation"
    ranked_by = "kl"

    def loss(self, model: Any, plain_model: Any, batch: dict[str, Tensor]) -> Tensor:
        a, pixels = self.arguments, self.mixed(batch).pixel_values
        if not a.feature_weight:
            reference = self.unmerged(plain_model, pixel_values=pixels).logits.float()
            return kl_to(reference, model(pixel_values=pixels).logits).mean()
        with recorded_features(self.teacher(plain_model), a.features) as features:
            reference, reference_features = self.unmerged(plain_model, pixel_values=pixels).logits.float(), features()
        with recorded_features(plain_model, a.features) as features:
            logits = model(pixel_values=pixels).logits
            distance = feature_distance(reference_features, features(), a.feature_loss)
        return (kl_to(reference, logits) + a.feature_weight * distance).mean()
