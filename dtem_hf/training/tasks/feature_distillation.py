"""Task `feature_distillation`: an encoder without a head (CLIP's, SigLIP's, DINOv2 …) keeps its unmerged features."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig

from ...models.auto import AutoModel
from ...models.distances import feature_distance, recorded_features
from .image_task import ImageTask


class FeatureDistillation(ImageTask):
    """The loss is the distance to the unmerged features; options `features` and `feature_loss` choose both."""

    name: ClassVar[str] = "feature_distillation"
    ranked_by = "distance"

    def load_model(self) -> Any:
        """The encoder; of a model that also reads text, its vision part."""
        a = self.arguments
        config = AutoConfig.from_pretrained(a.model, trust_remote_code=False)
        vision = getattr(config, "vision_config", config)
        return AutoModel.from_pretrained(a.model, merge=a.merge_config(), config=vision)

    def loss(self, model: Any, plain_model: Any, batch: dict[str, Tensor]) -> Tensor:
        a, pixels = self.arguments, self.mixed(batch).pixel_values
        reference = self._unmerged_features(plain_model, pixels)
        with recorded_features(plain_model, a.features) as features:
            model(pixel_values=pixels)
            return feature_distance(reference, features(), a.feature_loss).mean()

    def reference(self, plain_model: Any, batch: dict[str, Tensor]) -> Tensor:
        return self._unmerged_features(plain_model, batch["pixel_values"])

    def figures(self, model: Any, batch: dict[str, Tensor], reference: Tensor) -> dict[str, Tensor]:
        """Distance and cosine to the unmerged features, and `retrieval` (%).

        `retrieval`: whether merged and unmerged features of an image have the same nearest other image of the batch.
        """
        with recorded_features(model, self.arguments.features) as recorded:
            model(pixel_values=batch["pixel_values"])
            features = recorded()
        same = nearest(features, reference) == nearest(reference, reference)
        return {
            "distance": feature_distance(reference, features, self.arguments.feature_loss),
            "cosine": F.cosine_similarity(features, reference, dim=-1),
            "retrieval": (100.0 * same) if len(same) > 2 else torch.full_like(features[:, 0], torch.nan),
        }

    def _unmerged_features(self, plain_model: Any, pixel_values: Tensor) -> Tensor:
        with recorded_features(self.teacher(plain_model), self.arguments.features) as features:
            self.unmerged(plain_model, pixel_values=pixel_values)
            return features()


def nearest(queries: Tensor, gallery: Tensor) -> Tensor:
    """For query i, the index of the most similar gallery entry other than i: [B, D] twice -> [B]."""
    scores = F.normalize(queries, dim=-1) @ F.normalize(gallery, dim=-1).T
    return scores.fill_diagonal_(-torch.inf).argmax(dim=-1)
