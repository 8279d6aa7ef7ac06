"""Cross-entropy with the labels of the data (METHOD.md section 5)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from ...errors import BadValue
from .images import ImageTask


class Classification(ImageTask):
    """Every image needs a label."""

    name: ClassVar[str] = "classification"
    ranked_by: ClassVar[str] = "cross_entropy"

    def loss(self, model: Any, plain_model: Any, batch: dict[str, Tensor]) -> Tensor:
        unlabelled = batch["index"][batch["labels"] < 0]
        if len(unlabelled):
            raise BadValue(
                "task", self.name, f"image {int(unlabelled[0])} has no label; label it, or use task distillation"
            )
        return F.cross_entropy(model(pixel_values=batch["pixel_values"]).logits.float(), batch["labels"])
