"""Tasks `fisher`, `feature_fisher`, `caption_fisher`: learn without labels from how each merge changes the output."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ...configuration import LEARN_FIELDS
from ...data.captioned_images import MODEL_INPUTS
from ...errors import BadValue
from ...models.install import merging_of, recorded_steps
from ..fisher import fisher_loss, sampled_log_probability, sampled_projection, sampled_words
from .captioning import Captioning
from .feature_distillation import FeatureDistillation
from .image_task import ClassifierTask


class _HardMerging:
    """Mixin for tasks that merge hard. `output` is the output that merges change, and `sampler` draws from it."""

    soft: ClassVar[bool] = False

    def load_model(self: Any) -> Any:
        a = self.arguments
        reasons = {
            "train_backbone": "the loss has no gradient for the backbone; use task distillation",
            "gradient_checkpointing": "the loss takes gradients of the tokens themselves",
            **dict.fromkeys(
                LEARN_FIELDS, "learn it by distillation, with start_from; this task learns the metric only"
            ),
        }
        if a.method != "dtem":
            raise BadValue("method", a.method, f"dtem with task {self.name}, which needs merges of pairs")
        for name, reason in reasons.items():
            if getattr(a, name):
                raise BadValue(name, True, f"False with task {self.name}: {reason}")
        if a.straight_through_from is not None:
            raise BadValue(
                "straight_through_from", a.straight_through_from, f"no value: {self.name} always merges hard"
            )
        return super().load_model()  # type: ignore[misc]

    def loss(self: Any, model: Any, plain_model: Any, batch: dict[str, Tensor]) -> Tensor:
        a, merging = self.arguments, merging_of(plain_model)
        with recorded_steps(plain_model) as steps:
            output = self.output(model, plain_model, batch)
        outputs = [self.sampler(output, batch, a.seed, sample) for sample in range(a.fisher_samples)]
        return fisher_loss(steps, outputs, merging.cost.num_prefix_tokens, merging.config, a)


class Fisher(_HardMerging, ClassifierTask):
    """The loss is the expected cost of the embedding's merges, from the Fisher information of the logits."""

    name: ClassVar[str] = "fisher"
    ranked_by = "kl"
    sampler = staticmethod(sampled_log_probability)

    def output(self, model: Any, plain_model: Any, batch: dict[str, Tensor]) -> Tensor:
        """Logits [B, classes]."""
        return model(pixel_values=self.mixed(batch).pixel_values).logits


class FeatureFisher(_HardMerging, FeatureDistillation):
    """Like `Fisher`, for encoders without a head, from the change of features."""

    name: ClassVar[str] = "feature_fisher"
    ranked_by = "distance"
    sampler = staticmethod(sampled_projection)

    def output(self, model: Any, plain_model: Any, batch: dict[str, Tensor]) -> Tensor:
        """Features [B, D] or [B, N, D]."""
        return self.features(plain_model, self.mixed(batch).pixel_values, model)


class CaptionFisher(_HardMerging, Captioning):
    """Like `Fisher`, for captioning models, from the Fisher information of every word of a caption."""

    name: ClassVar[str] = "caption_fisher"
    sampler = staticmethod(sampled_words)

    def num_terms(self, batch: dict[str, Tensor]) -> None:
        """None: every image has the same weight, however long its caption is."""

    def output(self, model: Any, plain_model: Any, batch: dict[str, Tensor]) -> Tensor:
        """Logits [B, V + T, classes]."""
        return model(**{name: batch[name] for name in MODEL_INPUTS}).logits
