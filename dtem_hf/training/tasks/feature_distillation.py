"""Task `feature_distillation`: a merged encoder without a head (CLIP's, DINOv2 …) learns its unmerged features.

For a vision-language model, these are the features that its language model reads; the adapter fits the whole model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import BadValue
from ...families import find_place
from ...families.containers import container_of, states_read
from ...hub.client import cached_commit
from ...models.attach import attach
from ...models.auto import load_encoder
from ...models.dense_head import DenseHead
from ...models.distances import feature_distance, recorded_features
from ...models.vision import image_part
from ...programs.functions import load_function
from ..task_arguments import TaskArguments
from .image_task import ImageTask


class FeatureDistillation(ImageTask):
    """The loss is the distance `feature_loss` to the unmerged features of kind `features`.

    With a `head`, features are its maps. `states` are the indices of the hidden states that features are made of.
    """

    name: ClassVar[str] = "feature_distillation"
    ranked_by = "distance"

    def __init__(self, arguments: TaskArguments) -> None:
        super().__init__(arguments)
        name = arguments.head
        self.head = None if name is None else DenseHead(load_function("head", name), name)
        self.kind = arguments.features if name is None else "grid"
        self.states: tuple[int, ...] = (-1,)

    def load_model(self) -> Any:
        """The encoder; for a model that also reads text, its vision part."""
        a = self.arguments
        whole = load_encoder(a.model, a.features, a.part)
        place = find_place(whole, a.part)
        if place.part and container_of(type(whole)).reader == "grid":
            if a.features not in ("auto", "grid"):
                raise BadValue("features", a.features, f"auto or grid: {type(whole).__name__} reads every patch")
            self.kind, self.states = "grid", tuple(states_read(whole.config))
        # In float32: vision-language models are saved in half precision, which would lose small optimiser steps.
        model: Any = image_part(place.holder, place.encoder).float()
        model.name_or_path, model.config._commit_hash = whole.name_or_path, cached_commit(a.model)
        return attach(model, replace(a.merge_config(), part=None))

    def loss(self, model: Any, plain_model: Any, batch: dict[str, Tensor]) -> Tensor:
        pixels = self.mixed(batch).pixel_values
        reference = self._unmerged_features(plain_model, pixels)
        features = self.features(plain_model, pixels, model)
        return feature_distance(reference, features, self.arguments.feature_loss).mean()

    def features(self, model: Any, pixels: Tensor, run: Callable[..., Any]) -> Tensor:
        """The features [B, D] or [B, N, D] of `model`; `run` is called on the pixels and must run the model."""
        with recorded_features(model, self.kind, self.states) as recorded:
            run(pixel_values=pixels, **({} if self.states == (-1,) else {"output_hidden_states": True}))
            features = recorded()
        return features if self.head is None else self.head(model, features, pixels).flatten(1)

    def reference(self, plain_model: Any, batch: dict[str, Tensor]) -> Tensor:
        return self._unmerged_features(plain_model, batch["pixel_values"])

    def figures(self, model: Any, batch: dict[str, Tensor], reference: Tensor) -> dict[str, Tensor]:
        """Distance and cosine to the unmerged features, and `retrieval` (%).

        `retrieval`: whether an image's merged and unmerged features have the same nearest other image in the batch.
        """
        pixels = batch["pixel_values"]
        features = self.features(model, pixels, model)
        flat = reference.flatten(1)
        same = nearest(features.flatten(1), flat) == nearest(flat, flat)
        return {
            "distance": feature_distance(reference, features, self.arguments.feature_loss),
            "cosine": 1 - feature_distance(reference, features, "cosine"),
            "retrieval": (100.0 * same) if len(same) > 2 else torch.full_like(flat[:, 0], torch.nan),
        }

    def _unmerged_features(self, plain_model: Any, pixel_values: Tensor) -> Tensor:
        return self.features(self.teacher(plain_model), pixel_values, partial(self.unmerged, plain_model))


def nearest(queries: Tensor, gallery: Tensor) -> Tensor:
    """For query i, the index of the most similar gallery entry other than i: [B, D] twice -> [B]."""
    scores = F.normalize(queries, dim=-1) @ F.normalize(gallery, dim=-1).T
    return scores.fill_diagonal_(-torch.inf).argmax(dim=-1)
