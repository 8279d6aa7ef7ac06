"""The options of the tasks: model, data and loss."""

from __future__ import annotations

from dataclasses import dataclass

from ..data.augmentation import AUGMENTATIONS
from ..errors import BadValue
from ..models.distances import FEATURE_LOSSES, FEATURES
from ..programs.arguments import LABEL_COLUMN_HELP, at_least, one_of, option
from .curriculum import CurriculumArguments


@dataclass(kw_only=True)
class TaskArguments(CurriculumArguments):
    """The model that learns, the images it learns from, and the loss."""

    model: str = option("backbone: Hub id or local folder")
    data: str = option("images: Hub dataset id, folder of class folders, or folder with labels.csv (file,label)")
    split: str = option("split of a Hub dataset, or of a folder with train, val or test in it", default="train")
    label_column: str | None = option(LABEL_COLUMN_HELP, default=None)
    streaming: bool = option("read the data as a stream, instead of storing it first", default=False)
    shuffle_buffer: int = option("images of a stream that are shuffled together", default=1000)
    validation_data: str | None = option("images to validate on; left out: a held-out part of the data", default=None)
    validation_split: str = option("split of a Hub dataset to validate on", default="validation")
    validation_size: int = option("images held out, or taken from validation_data", default=256)
    captions: str | None = option(
        "captions of the images in folder data: COCO's annotations, Karpathy's JSON, or a table of image and caption",
        default=None,
    )
    validation_captions: str | None = option("captions of the images to validate on", default=None)
    train_backbone: bool = option("end to end: the backbone learns too, and the whole model is saved", default=False)
    gradient_checkpointing: bool = option("recompute activations to save memory", default=False)
    augmentation: str = option("augmentation of training images: " + ", ".join(AUGMENTATIONS), default="none")
    mixup: float = option("mixup: parameter of the Beta distribution, 0.8 as published", default=0.0)
    cutmix: float = option("cutmix: parameter of the Beta distribution, 1.0 as published", default=0.0)
    label_smoothing: float = option("classification: share of the target spread over all classes", default=0.0)
    features: str = option("features to distil: " + ", ".join(FEATURES), default="auto")
    head: str | None = option(
        "feature_distillation, feature_fisher: module:function that makes maps [B, H, W] from patches [B, D, rows, "
        "columns]; the loss then compares these maps instead of features",
        default=None,
    )
    feature_loss: str = option("distance of features: " + " or ".join(FEATURE_LOSSES), default="cosine")
    feature_weight: float = option("distillation: weight of the feature distance, added to the loss", default=0.0)
    distillation_weight: float | None = option(
        "captioning, contrastive: share of the divergence from the unmerged model in the loss, beside the model's own "
        "loss (left out: 0 and 1); classification: weight of this divergence, added to the loss",
        default=None,
    )
    max_caption_tokens: int = option("largest length of captions in tokens; longer captions are cut", default=40)
    fisher_samples: int = option("fisher: gradients per image and step", default=1)
    fisher_similarity: float = option(
        "fisher: the cost of a merge grows by the factor exp(this · (1 - cosine of the tokens' attention keys))",
        default=4.0,
    )
    fisher_floor: float = option("fisher: least cost of a merge, as a share of the image's mean", default=1e-3)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "validation_size", "shuffle_buffer", "fisher_samples")
        at_least(self, 2, "max_caption_tokens")
        at_least(self, 0, "mixup", "cutmix", "feature_weight", "fisher_similarity", "fisher_floor")
        for name in ("label_smoothing", "distillation_weight"):
            if not 0 <= (getattr(self, name) or 0) <= 1:
                raise BadValue(name, getattr(self, name), "a number from 0 to 1")
        one_of(self, "augmentation", AUGMENTATIONS)
        one_of(self, "features", FEATURES)
        one_of(self, "feature_loss", FEATURE_LOSSES)
