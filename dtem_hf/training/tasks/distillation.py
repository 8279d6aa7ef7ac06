"""Label-free: a merged model should say what the same model says without merging."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from .base import kl_to, unmerged_logits
from .images import ImageTask


class Distillation(ImageTask):
    """KL from the model's own unmerged output; any folder of images will do."""

    name: ClassVar[str] = "distillation"
    ranked_by: ClassVar[str] = "kl"

    def loss(self, model: Any, plain_model: Any, batch: dict[str, Tensor]) -> Tensor:
        reference = unmerged_logits(plain_model, batch["pixel_values"])
        return kl_to(reference, model(pixel_values=batch["pixel_values"]).logits).mean()
