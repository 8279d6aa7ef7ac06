"""The options of training; those that describe the embedding are DTEMConfig's own."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from typing import Any, Literal, get_type_hints

from ..configuration import LEARN_FIELDS, DTEMConfig
from ..data.augmentation import AUGMENTATIONS
from ..errors import BadValue
from ..models.distances import FEATURE_LOSSES, FEATURES
from ..programs.arguments import option, parse_reduction
from .curriculum import CurriculumArguments
from .fisher import FisherArguments
from .tasks import task_names


def _merge_options() -> list[tuple[str, Any, Any]]:
    """DTEMConfig's fields as command-line options; r is text there, as it may be a number, a list or a schedule."""
    hints, options = get_type_hints(DTEMConfig), []
    for f in fields(DTEMConfig):
        assert f.default is not MISSING
        kind, default = (str, str(f.default)) if f.name == "r" else (hints[f.name], f.default)
        options.append((f.name, kind, field(default=default, metadata=dict(f.metadata))))
    return options


MergeArguments: Any = make_dataclass("MergeArguments", _merge_options(), kw_only=True)


@dataclass(kw_only=True)
class TrainArguments(CurriculumArguments, FisherArguments, MergeArguments):
    """Learn a merge embedding for a frozen backbone."""

    model: str = option("backbone: Hub id or local folder")
    data: str = option("images: Hub dataset id, folder of class folders, or folder with labels.csv (file,label)")
    split: str = option("split of a Hub dataset", default="train")
    streaming: bool = option("read the data as it arrives, instead of storing it first", default=False)
    shuffle_buffer: int = option("images of a stream that are shuffled together", default=1000)
    on_bad_image: Literal["error", "skip"] = option(
        "error: an unreadable image ends the run; skip: it is left out, and counted", default="error"
    )
    validation_data: str | None = option(
        "images to validate on; left out, some are held out of the data", default=None
    )
    validation_split: str = option("split of a Hub dataset to validate on", default="validation")
    validation_size: int = option("images held out, or taken from validation_data", default=256)
    captions: str | None = option(
        "captions of the images in folder data: COCO's annotations, Karpathy's JSON, or a table of image and caption",
        default=None,
    )
    validation_captions: str | None = option("captions of the images to validate on", default=None)
    output_dir: str = option("folder for checkpoints, metrics and the adapter", default="runs/train")
    start_from: str | None = option("adapter (Hub id or folder) to go on from, instead of init", default=None)
    task: str = option("what teaches the embedding: " + " or ".join(task_names()), default="distillation")
    steps: int = option("optimiser steps", default=400)
    epochs: float | None = option("passes over the images, instead of steps", default=None)
    batch_size: int = option("images per process and step", default=32)
    gradient_accumulation_steps: int = option("batches added up per optimiser step", default=1)
    lr: float = option("learning rate at the start; 0 leaves as it is what tokens are compared by", default=5e-4)
    aggregation_lr: float = option(
        "learning rate at the start of what learn_exponents and learn_norms add", default=2e-2
    )
    min_lr: float = option("learning rate at the end of the half cosine", default=1e-6)
    warmup_steps: int = option("steps of linear warm-up", default=0)
    weight_decay: float = option("AdamW's weight decay", default=1e-4)
    max_grad_norm: float = option("gradients are clipped to this norm", default=5.0)
    train_backbone: bool = option("end to end: the backbone learns too, and the whole model is saved", default=False)
    backbone_lr: float = option("learning rate of the backbone at the start", default=1e-5)
    backbone_weight_decay: float = option("AdamW's weight decay for the backbone's matrices", default=0.05)
    layer_decay: float = option("each layer of the backbone learns slower than the next by this factor", default=1.0)
    augmentation: str = option("of the training images: " + ", ".join(AUGMENTATIONS), default="none")
    mixup: float = option("mix images: parameter of mixup's Beta distribution, 0.8 as published", default=0.0)
    cutmix: float = option("cut images into others: parameter of cutmix's Beta, 1.0 as published", default=0.0)
    label_smoothing: float = option("classification: share of the target that all classes get", default=0.0)
    features: str = option("what of an encoder is distilled: " + ", ".join(FEATURES), default="auto")
    feature_loss: str = option("distance of features: " + " or ".join(FEATURE_LOSSES), default="cosine")
    feature_weight: float = option("distillation of logits: weight of an added feature distance", default=0.0)
    distillation_weight: float | None = option(
        "captioning, contrastive: share of the loss that is the divergence from the unmerged model; the rest is the "
        "model's own loss; left out: 0 in captioning, 1 in contrastive",
        default=None,
    )
    max_caption_tokens: int = option("captions are cut to this length", default=40)
    seed: int = option("of everything that is drawn", default=0)
    validate_every: int = option("steps between validations of the hard model", default=100)
    glance_every: int = option(
        "steps between looks at one fixed batch, softly and hard merged, and at tokens per layer; 0: none", default=50
    )
    checkpoint_every: int = option("steps between checkpoints", default=50)
    keep_checkpoints: int = option("checkpoints that are kept", default=2)
    resume: Literal["auto", "never"] = option(
        "auto: go on where the run in output_dir stopped; never: start over", default="auto"
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
    gradient_checkpointing: bool = option("recompute activations to save memory", default=False)
    base_model: str | None = option(
        "the backbone's Hub id, for the adapter's record, if model is a folder", default=None
    )
    push_to_hub: bool = option("publish what was learned on the Hub when the run is finished", default=False)
    hub_model_id: str | None = option("repository that it goes to (user/repo), made if it is not there", default=None)
    hub_private_repo: bool = option("make the repository private", default=False)
    push_every: int = option(
        "steps between pushes of the best adapter so far to hub_branch; 0: none before the end", default=0
    )
    hub_branch: str = option("branch that the pushes before the end go to", default="training")
    overwrite_card: bool = option("replace a README.md that is in the repository", default=False)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "gradient_accumulation_steps", "validation_size", "validate_every"):
            _at_least(name, getattr(self, name), 1)
        for name in ("checkpoint_every", "keep_checkpoints", "shuffle_buffer"):
            _at_least(name, getattr(self, name), 1)
        _at_least("max_caption_tokens", self.max_caption_tokens, 2)
        for name in ("backbone_lr", "backbone_weight_decay", "mixup", "cutmix", "feature_weight"):
            _at_least(name, getattr(self, name), 0)
        for name in ("label_smoothing", "distillation_weight"):
            if not 0 <= (getattr(self, name) or 0) <= 1:
                raise BadValue(name, getattr(self, name), "a number from 0 to 1")
        if not 0 < self.layer_decay <= 1:
            raise BadValue("layer_decay", self.layer_decay, "above 0 and at most 1, which is none")
        for name, names in (("features", FEATURES), ("feature_loss", FEATURE_LOSSES)):
            if getattr(self, name) not in names:
                raise BadValue(name, getattr(self, name), f"one of {', '.join(names)}")
        if self.num_threads is not None:
            _at_least("num_threads", self.num_threads, 1)
        if self.epochs is not None and not self.epochs > 0:
            raise BadValue("epochs", self.epochs, "a number above 0")
        for name in ("glance_every", "min_lr", "warmup_steps", "weight_decay", "num_workers", "push_every"):
            _at_least(name, getattr(self, name), 0)
        if not self.max_grad_norm > 0:
            raise BadValue("max_grad_norm", self.max_grad_norm, "a number above 0")
        aggregates = any(getattr(self, name) for name in LEARN_FIELDS)
        if not self.lr >= 0 or (self.lr == 0 and not aggregates):
            right = "a number above 0" + (", or 0" if aggregates else f"; with {' or '.join(LEARN_FIELDS)} also 0")
            raise BadValue("lr", self.lr, right)
        if not self.aggregation_lr > 0:
            raise BadValue("aggregation_lr", self.aggregation_lr, "a number above 0")
        if self.push_to_hub and not self.hub_model_id:
            raise BadValue("hub_model_id", self.hub_model_id, "a repository like user/repo, as push_to_hub is set")
        if self.push_every and not self.push_to_hub:
            raise BadValue("push_every", self.push_every, "0, or push_to_hub and hub_model_id beside it")
        self.check_curriculum()
        self.check_fisher()
        self.merge_config()

    def merge_config(self) -> DTEMConfig:
        """The config of the embedding to learn. Raises ValueError for an option that makes no sense."""
        values = {f.name: getattr(self, f.name) for f in fields(DTEMConfig)}
        return DTEMConfig.from_dict({**values, "r": parse_reduction(str(values["r"]))})


def _at_least(name: str, value: float, low: float) -> None:
    if not value >= low:
        raise BadValue(name, value, f"{low} or more")
