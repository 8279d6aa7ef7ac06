"""Label-free and local: every merge is judged by how much it would change what the model says."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ...configuration import LEARN_FIELDS
from ...data.captioned_images import MODEL_INPUTS
from ...errors import BadValue
from ...models.distances import recorded_features
from ...models.install import merging_of, recorded_steps
from ...token_state import MergeStep
from ..fisher import Sampler, fisher_loss, sampled_log_probability, sampled_projection, sampled_words
from .base import Task
from .captioning import Captioning
from .feature_distillation import FeatureDistillation
from .images import ClassifierTask


class _JudgesMerges:
    """What the tasks of this file share: they merge hard, and refuse options that they have no use for."""

    soft: ClassVar[bool] = False

    def load_model(self: Any) -> Any:
        _check(self)
        return super().load_model()  # type: ignore[misc]


class Fisher(_JudgesMerges, ClassifierTask):
    """The expected cost of the merges that the embedding would choose, by the Fisher information of the logits."""

    name: ClassVar[str] = "fisher"
    ranked_by = "kl"

    def loss(self, model: Any, plain_model: Any, batch: dict[str, Tensor]) -> Tensor:
        with recorded_steps(plain_model) as steps:
            logits = model(pixel_values=self.mixed(batch).pixel_values).logits
        return _loss(self, plain_model, steps, logits, sampled_log_probability, batch)


class FeatureFisher(_JudgesMerges, FeatureDistillation):
    """The same for encoders without a head, by how far their features would move."""

    name: ClassVar[str] = "feature_fisher"
    ranked_by = "distance"

    def loss(self, model: Any, plain_model: Any, batch: dict[str, Tensor]) -> Tensor:
        with recorded_steps(plain_model) as steps, recorded_features(plain_model, self.arguments.features) as features:
            model(pixel_values=self.mixed(batch).pixel_values)
            output = features()
        return _loss(self, plain_model, steps, output, sampled_projection, batch)


class CaptionFisher(_JudgesMerges, Captioning):
    """The same for captioning models, by the Fisher information of every word of a caption."""

    name: ClassVar[str] = "caption_fisher"

    def loss(self, model: Any, plain_model: Any, batch: dict[str, Tensor]) -> Tensor:
        with recorded_steps(plain_model) as steps:
            logits = model(**{name: batch[name] for name in MODEL_INPUTS}).logits
        return _loss(self, plain_model, steps, logits, sampled_words, batch)


def _loss(
    task: Task, model: Any, steps: list[MergeStep], output: Tensor, sampler: Sampler, batch: dict[str, Tensor]
) -> Tensor:
    a, merging = task.arguments, merging_of(model)
    outputs = [sampler(output, batch, a.seed, sample) for sample in range(a.fisher_samples)]
    return fisher_loss(steps, outputs, merging.cost.num_prefix_tokens, merging.config, a)  # type: ignore[arg-type]


def _check(task: Task) -> None:
    a = task.arguments
    for name, right in (
        ("train_backbone", "False: the loss says nothing about the backbone; choose distillation"),
        ("gradient_checkpointing", "False: gradients of the tokens themselves are taken"),
    ):
        if getattr(a, name):
            raise BadValue(name, True, f"with task {task.name}, {right}")
    for name in LEARN_FIELDS:
        if getattr(a, name):
            right = f"False: {task.name} teaches which tokens to merge; learn it by distillation, with start_from"
            raise BadValue(name, True, right)
    if a.straight_through_from is not None:
        raise BadValue("straight_through_from", a.straight_through_from, f"nothing: {task.name} always merges hard")
