"""Task `feature_distillation`: an encoder without a head (CLIP's, SigLIP's, DINOv2 …) keeps its unmerged features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig

from ...models.auto import AutoModel
from ...models.dense_head import DenseHead
from ...models.distances import feature_distance, recorded_features
from ...programs.functions import load_function
from ..task_arguments import TaskArguments
from .image_task import ImageTask


class FeatureDistillation(ImageTask):
    """The loss is the distance to the unmerged features; options `features` and `feature_loss` choose both.

    With a `head`, features are its maps.
    """

    name: ClassVar[str] = "feature_distillation"
    ranked_by = "distance"

    def __init__(self, arguments: TaskArguments) -> None:
        super().__init__(arguments)
        name = arguments.head
        self.head = None if name is None else DenseHead(load_function("head", name), name)

    def load_model(self) -> Any:
        """The encoder; of a model that also reads text, its vision part."""
        a = self.arguments
        config = AutoConfig.from_pretrained(a.model, trust_remote_code=False)
        vision = getattr(config, "vision_config", config)
        return AutoModel.from_pretrained(a.model, merge=a.merge_config(), config=vision)

    def loss(self, model: Any, plain_model: Any, batch: dict[str, Tensor]) -> Tensor:
        a, pixels = self.arguments, self.mixed(batch).pixel_values
        reference = self._unmerged_features(plain_model, pixels)
        features = self.features(plain_model, pixels, lambda: model(pixel_values=pixels))
        return feature_distance(reference, features, a.feature_loss).mean()

    def features(self, model: Any, pixels: Tensor, run: Callable[[], Any]) -> Tensor:
        """The features of a model that `run` runs on pixels: [B, D] or [B, N, D]."""
        with recorded_features(model, self.arguments.features if self.head is None else "grid") as recorded:
            run()
            features = recorded()
        return features if self.head is None else self.head(model, features, pixels).flatten(1)

    def reference(self, plain_model: Any, batch: dict[str, Tensor]) -> Tensor:
        return self._unmerged_features(plain_model, batch["pixel_values"])

    def figures(self, model: Any, batch: dict[str, Tensor], reference: Tensor) -> dict[str, Tensor]:
        """Distance and cosine to the unmerged features, and `retrieval` (%).

        `retrieval`: whether merged and unmerged features of an image have the same nearest other image of the batch.
        """
        pixels = batch["pixel_values"]
        features = self.features(model, pixels, lambda: model(pixel_values=pixels))
        flat = reference.flatten(1)
        same = nearest(features.flatten(1), flat) == nearest(flat, flat)
        return {
            "distance": feature_distance(reference, features, self.arguments.feature_loss),
            "cosine": 1 - feature_distance(reference, features, "cosine"),
            "retrieval": (100.0 * same) if len(same) > 2 else torch.full_like(flat[:, 0], torch.nan),
        }

    def _unmerged_features(self, plain_model: Any, pixel_values: Tensor) -> Tensor:
        def run() -> Any:
            return self.unmerged(plain_model, pixel_values=pixel_values)

        return self.features(self.teacher(plain_model), pixel_values, run)


def nearest(queries: Tensor, gallery: Tensor) -> Tensor:
    """For query i, the index of the most similar gallery entry other than i: [B, D] twice -> [B]."""
    scores = F.normalize(queries, dim=-1) @ F.normalize(gallery, dim=-1).T
    return scores.fill_diagonal_(-torch.inf).argmax(dim=-1)
