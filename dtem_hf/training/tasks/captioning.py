"""Task `captioning`: a captioning model (GIT, BLIP) learns from its own loss on reference captions."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from transformers import AutoConfig

from ...data.captioned_images import MODEL_INPUTS
from ...errors import BadValue
from ...families import find_place
from ...models.auto import auto_class, load_whole
from ...models.distances import caption_losses, kl_to
from .caption_task import CaptionTask


class Captioning(CaptionTask):
    """It needs the option `captions`, and the images in the folder `data`.

    A share `distillation_weight` of the loss is the KL divergence of word probabilities from the unmerged model's.
    """

    name: ClassVar[str] = "captioning"
    ranked_by = "loss"

    def load_model(self) -> Any:
        a = self.arguments
        config = AutoConfig.from_pretrained(a.model, trust_remote_code=False)
        model = load_whole(auto_class(config), a.model, merge=a.merge_config())
        if not model.can_generate() or find_place(model).part:
            right = f"a model that writes captions (GIT, BLIP), not {type(model).__name__}; for one with a vision "
            raise BadValue("model", a.model, f"{right}tower inside, see examples/train_llava.py")
        return model

    def loss(self, model: Any, plain_model: Any, batch: dict[str, Tensor]) -> Tensor:
        weight, inputs = self.arguments.distillation_weight or 0.0, {name: batch[name] for name in MODEL_INPUTS}
        output = model(**inputs, labels=batch["labels"])
        if not weight:
            return output.loss
        target = self.unmerged(plain_model, **inputs).logits
        return (1 - weight) * output.loss + weight * word_divergence(target, output.logits, batch["labels"])

    def num_terms(self, batch: dict[str, Tensor]) -> Tensor | None:
        """The number of words that the model predicts."""
        return (batch["labels"][:, 1:] != -100).sum()

    def reference(self, plain_model: Any, batch: dict[str, Tensor]) -> Tensor:
        output = self.unmerged(plain_model, **{name: batch[name] for name in MODEL_INPUTS})
        return caption_losses(output.logits, batch["labels"])

    def figures(self, model: Any, batch: dict[str, Tensor], reference: Tensor) -> dict[str, Tensor]:
        """The loss of each caption (nats per token), under the hard and under the unmerged model."""
        output = model(**{name: batch[name] for name in MODEL_INPUTS})
        return {"loss": caption_losses(output.logits, batch["labels"]), "unmerged_loss": reference}

    def summarize(self, means: dict[str, float]) -> dict[str, float]:
        """Add `ratio`, the loss divided by the unmerged model's loss."""
        return {**means, "ratio": means["loss"] / means["unmerged_loss"]}


def word_divergence(target: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the words of all captions of KL(target ‖ model), in nats: [B, V + T, classes] twice, [B, T]."""
    predicts = labels[:, 1:] != -100
    length = labels.shape[1]
    return kl_to(target[:, -length:-1][predicts].float(), logits[:, -length:-1][predicts]).mean()
