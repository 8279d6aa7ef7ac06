"""Shared options of the programs that measure rows: methods, amounts of merging, and resuming."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..data.folders import NO_LABELS
from ..data.images import ProcessedImages, collate, load_images
from ..hub.adapter import MergeAdapter
from ..opening import load_processor
from ..programs.arguments import DTYPES, ModelArguments, at_least, one_of, option, parse_reduction
from ..programs.conditions import conditions, data_name, describe_model
from ..programs.identity import digest, weights_digest
from .variants import Variant, make_variants, method_names


@dataclass(kw_only=True)
class DrawnImages(ModelArguments):
    """A random sample of the images of a data set, without labels."""

    data: str = option("images: Hub dataset id, folder of class folders, or folder of images; labels are not read")
    split: str = option("split of a Hub dataset", default="train")
    num_images: int = option("images to compare outputs on, drawn by seed", default=128)
    seed: int = option("seed that draws the images", default=0)

    def __post_init__(self) -> None:
        at_least(self, 1, "num_images")

    def draw(self, limit: int | None = None) -> tuple[Tensor, dict[str, Any]]:
        """Draw images: pixel values [n, C, H, W], and their description for a record.

        `limit` draws from the first so many images only.
        """
        images = ProcessedImages(load_images(self.data, self.split, limit, NO_LABELS), load_processor(self.model))
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.seed))
        pixels = collate([images[i] for i in order[: self.num_images].tolist()])["pixel_values"]
        return pixels, {"name": data_name(self.data), "num_images": len(pixels), "seed": self.seed}


METHODS_HELP = f"some of {', '.join(method_names())}"


@dataclass(kw_only=True)
class RowArguments(ModelArguments):
    """One model with several methods and amounts of merging: the rows of a result."""

    methods: list[str] = option(METHODS_HELP, default_factory=lambda: ["none", "tome", "dtem"])
    r: list[str] = option("tokens merged per layer, one row each", default_factory=lambda: ["4", "8", "12"])
    flops: list[float] = option("shares of the multiply-adds to reach, one row each", default_factory=list)
    adapter: str | None = option(
        "trained adapter for dtem: Hub id or local folder; left out, dtem is untrained and equals tome",
        default=None,
    )

    def adapter_references(self) -> list[str]:
        """The adapters to measure methods with an embedding with; empty: untrained, from keys."""
        return [] if self.adapter is None else [self.adapter]

    def load_adapters(self) -> dict[str, MergeAdapter]:
        """The adapters of `adapter_references`, by name."""
        return {name: MergeAdapter.from_reference(name) for name in self.adapter_references()}

    def facts(self, model: Any, device: torch.device) -> dict[str, Any]:
        """The conditions of a result, with its model and adapter."""
        return {**conditions(device), "model": describe_model(self.model, model), "adapter": self.adapter}

    def reductions(self) -> list[Any]:
        """The parsed values of the option r, for `set_reduction`."""
        return [parse_reduction(text) for text in self.r]

    def make_variants(self, model: Any, adapters: dict[str, MergeAdapter], **options: Any) -> list[Variant]:
        """The rows of a plain model; `options` go to `attach`."""
        return make_variants(model, self.methods, self.reductions(), self.flops, adapters, **options)


@dataclass(kw_only=True)
class SeveralAdapters(RowArguments):
    """Rows of several adapters."""

    adapters: list[str] = option(
        "trained adapters; a method that learns has rows for each of its adapters", default_factory=list
    )

    def adapter_references(self) -> list[str]:
        return list(dict.fromkeys([*super().adapter_references(), *self.adapters]))


@dataclass(kw_only=True)
class ResumableArguments(RowArguments):
    """Rows that are measured batch by batch, in one process or several, and can resume."""

    limit: int | None = option("use only this many images, the first ones", default=None)
    batch_size: int = option("images per batch", default=32)
    num_workers: int = option("processes that decode images", default=1)
    dtype: str = option(", ".join(DTYPES), default="float32")
    output_dir: str = option("folder for the results", default="runs/evaluate")
    resume: Literal["auto", "never"] = option(
        "auto: resume an interrupted run in output_dir; never: start over", default="auto"
    )

    def __post_init__(self) -> None:
        at_least(self, 1, "batch_size", "limit")
        at_least(self, 0, "num_workers")
        one_of(self, "dtype", DTYPES)

    def run_facts(
        self, model: Any, variants: Sequence[Variant], adapters: dict[str, MergeAdapter], processor: Any, **data: Any
    ) -> dict[str, Any]:
        """All that the results of a run depend on, as JSON; `data` describes the images."""
        weights = {name: weights_digest(adapter.tensors) for name, adapter in adapters.items()}
        return {
            "rows": [[variant.method, variant.shown_r, variant.adapter] for variant in variants],
            "weights": {"model": weights_digest(model.state_dict()), **weights},
            "processor": digest(processor.to_dict()),
            **data,
            "batch_size": self.batch_size,
            "dtype": self.dtype,
        }
