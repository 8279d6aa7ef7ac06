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
        f"the loss and the model it is for: {', '.join(task_names())}; fisher tasks judge each merge by how much it "
        "would change the output",
        default="distillation",
    )
    on_bad_image: Literal["error", "skip"] = option(
        "error: an unreadable image ends the run; skip: it is left out, and counted", default="error"
    )
    output_dir: str = option("folder for checkpoints, metrics and the adapter", default="runs/train")
    start_from: list[str] = option(
        "adapter (Hub id or folder) to start from, instead of init; of several, their mean", default_factory=list
    )
    epochs: float | None = option("passes over the images, instead of steps", default=None)
    batch_size: int = option("images per process and batch", default=32)
    gradient_accumulation_steps: int = option("batches per optimiser step and process", default=1)
    lr: float = option(
        "first learning rate of the embedding; 0 freezes the projections that tokens are compared by", default=5e-4
    )
    aggregation_lr: float = option("first learning rate of what learn_exponents and learn_norms add", default=2e-2)
    shift_lr: float = option("first learning rate of what learn_shifts adds", default=1e-3)
    min_lr: float = option("learning rate at the end of the half cosine", default=1e-6)
    warmup_steps: int = option("steps of linear warm-up", default=0)
    weight_decay: float = option("AdamW's weight decay", default=1e-4)
    max_grad_norm: float = option("gradients are clipped to this norm", default=5.0)
    backbone_lr: float = option("first learning rate of the backbone", default=1e-5)
    backbone_weight_decay: float = option("AdamW's weight decay for the backbone's matrices", default=0.05)
    layer_decay: float = option("learning rate of each backbone layer, as a share of the next one's", default=1.0)
    validate_every: int = option("steps between validations of the hard model", default=100)
    glance_every: int = option(
        "steps between looks at one fixed batch, softly and hard merged, and at tokens per layer; 0: none", default=50
    )
    checkpoint_every: int = option("steps between checkpoints", default=50)
    keep_checkpoints: int = option("checkpoints that are kept", default=2)
    resume: Literal["auto", "never"] = option(
        "auto: go on from the newest checkpoint in output_dir; never: start over", default="auto"
    )
    num_workers: int = option("processes that decode images", default=1)
    num_threads: int | None = option(
        "CPU threads of each process; left out: OMP_NUM_THREADS if you set it, or the cores shared out", default=None
    )
    mixed_precision: Literal["no", "bf16", "fp16"] | None = option(
        "number format of the forward pass; left out: what the launcher says", default=None
    )
    report_to: list[str] = option(
        "trackers, beside metrics.jsonl: tensorboard, trackio, wandb, any other of Accelerate's, or none",
        default_factory=lambda: ["none"],
    )
    base_model: str | None = option(
        "the backbone's Hub id, for the adapter's record, if model is a folder", default=None
    )
    push_to_hub: bool = option("publish the result on the Hub when the run is finished", default=False)
    hub_model_id: str | None = option("repository to publish to (user/repo), made if it is not there", default=None)
    hub_private_repo: bool = option("make the repository private", default=False)
    push_every: int = option(
        "steps between pushes of the best adapter so far to hub_branch; 0: none before the end", default=0
    )
    hub_branch: str = option("branch for the pushes before the end", default="training")
    overwrite_card: bool = option("replace a README.md that is in the repository", default=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.start_from = [self.start_from] if isinstance(self.start_from, str) else self.start_from
        at_least(self, 1, "batch_size", "gradient_accumulation_steps", "num_threads")
        at_least(self, 1, "validate_every", "checkpoint_every", "keep_checkpoints")
        at_least(self, 0, "glance_every", "push_every", "num_workers", "warmup_steps")
        at_least(self, 0, "min_lr", "weight_decay", "backbone_lr", "backbone_weight_decay")
        above_zero(self, "epochs", "max_grad_norm", "aggregation_lr", "shift_lr")
        if not 0 < self.layer_decay <= 1:
            raise BadValue("layer_decay", self.layer_decay, "above 0 and at most 1, which is none")
        aggregates = any(getattr(self, name) for name in LEARN_FIELDS)
        if not 0 <= self.lr < math.inf or (self.lr == 0 and not aggregates):
            right = "a number above 0" + (", or 0" if aggregates else f"; with {' or '.join(LEARN_FIELDS)} also 0")
            raise BadValue("lr", self.lr, right)
        if self.push_to_hub and not self.hub_model_id:
            raise BadValue("hub_model_id", self.hub_model_id, "a repository like user/repo, as push_to_hub is set")
        if self.push_every and not self.push_to_hub:
            raise BadValue("push_every", self.push_every, "0, or push_to_hub and hub_model_id beside it")
