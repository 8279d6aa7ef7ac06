"""The options of the training program."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..configuration import LEARN_FIELDS
from ..errors import BadValue
from ..programs.arguments import above_zero, at_least, option
from .task_arguments import TaskArguments
from .tasks import task_names


@dataclass(kw_only=True)
class TrainArguments(TaskArguments):
    """Learn a merge embedding for a frozen backbone."""

    task: str = option(
        f"the loss, and the kind of model: {', '.join(task_names())}; fisher tasks weigh each merge by how much it "
        "would change the output",
        default="distillation",
    )
    on_bad_image: Literal["error", "skip"] = option(
        "error: an unreadable image ends the run; skip: the run leaves it out and counts it", default="error"
    )
    output_dir: str = option("folder for checkpoints, metrics and the adapter", default="runs/train")
    start_from: list[str] = option(
        "adapter (Hub id or folder) to start from, instead of init; several: their mean", default_factory=list
    )
    epochs: float | None = option("passes over the images, instead of steps", default=None)
    batch_size: int = option("images per process and batch", default=32)
    gradient_accumulation_steps: int = option("batches per optimiser step and process", default=1)
    lr: float = option("first learning rate of the embedding's projections; 0 freezes them", default=5e-4)
    aggregation_lr: float = option(
        "first learning rate of exponents and norms (learn_exponents, learn_norms)", default=2e-2
    )
    shift_lr: float = option("first learning rate of shifts (learn_shifts)", default=1e-3)
    min_lr: float = option("learning rate at the end of the half cosine", default=1e-6)
    warmup_steps: int = option("steps of linear warm-up", default=0)
    weight_decay: float = option("AdamW's weight decay", default=1e-4)
    max_grad_norm: float = option("gradients are clipped to this norm", default=5.0)
    backbone_lr: float = option("first learning rate of the backbone", default=1e-5)
    backbone_weight_decay: float = option("AdamW's weight decay for the backbone's matrices", default=0.05)
    layer_decay: float = option("learning rate of each backbone layer, as a share of the next one's", default=1.0)
    validate_every: int = option("steps between validations of the hard model", default=100)
    glance_every: int = option(
        "steps between measurements of the soft and the hard model on one fixed batch; 0: none", default=50
    )
    checkpoint_every: int = option("steps between checkpoints", default=50)
    keep_checkpoints: int = option("number of checkpoints to keep", default=2)
    resume: Literal["auto", "never"] = option(
        "auto: go on from the newest checkpoint in output_dir; never: start over", default="auto"
    )
    num_workers: int = option("processes that decode images", default=1)
    num_threads: int | None = option(
        "CPU threads per process; left out: your OMP_NUM_THREADS, or an equal share of the cores",
        default=None,
    )
    mixed_precision: Literal["no", "bf16", "fp16"] | None = option(
        "number format of the forward pass; left out: the launcher's", default=None
    )
    report_to: list[str] = option(
        "trackers, beside metrics.jsonl: tensorboard, trackio, wandb, another of Accelerate's, or none",
        default_factory=lambda: ["none"],
    )
    base_model: str | None = option(
        "the backbone's Hub id, for the adapter's record, if model is a folder", default=None
    )
    push_to_hub: bool = option("publish the result on the Hub at the end of the run", default=False)
    hub_model_id: str | None = option("repository to publish to (user/repo); a missing one is made", default=None)
    hub_private_repo: bool = option("make the repository private", default=False)
    push_every: int = option(
        "steps between pushes of the best adapter so far to hub_branch; 0: none before the end", default=0
    )
    hub_branch: str = option("branch for the pushes before the end", default="training")
    overwrite_card: bool = option("replace an existing README.md of the repository", default=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.start_from = [self.start_from] if isinstance(self.start_from, str) else self.start_from
        at_least(self, 1, "batch_size", "gradient_accumulation_steps", "num_threads")
        at_least(self, 1, "validate_every", "checkpoint_every", "keep_checkpoints")
        at_least(self, 0, "glance_every", "push_every", "num_workers", "warmup_steps")
        at_least(self, 0, "min_lr", "weight_decay", "backbone_lr", "backbone_weight_decay")
        above_zero(self, "epochs", "max_grad_norm", "aggregation_lr", "shift_lr")
        if not 0 < self.layer_decay <= 1:
            raise BadValue("layer_decay", self.layer_decay, "above 0 and at most 1 (1: no decay)")
        aggregates = any(getattr(self, name) for name in LEARN_FIELDS)
        if not 0 <= self.lr < math.inf or (self.lr == 0 and not aggregates):
            right = "a number above 0" + (", or 0" if aggregates else f"; with {' or '.join(LEARN_FIELDS)} also 0")
            raise BadValue("lr", self.lr, right)
        if self.push_to_hub and not self.hub_model_id:
            raise BadValue("hub_model_id", self.hub_model_id, "a repository like user/repo, as push_to_hub is set")
        if self.push_every and not self.push_to_hub:
            raise BadValue("push_every", self.push_every, "0, or set push_to_hub and hub_model_id, too")
