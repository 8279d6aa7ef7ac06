"""Measure accuracy and speed with and without merging, in one pass over the images; without a head, by features.

python recipes/evaluate.py --model facebook/deit-small-patch16-224 --data path/to/images --adapter me/dtem-deit-small
python recipes/evaluate.py --model ... --data ... --methods tome --r 8 16 --limit 200    # a laptop's CPU
python recipes/evaluate.py --model ... --data ... --runtime openvino_bfloat16    # in another runtime
python recipes/evaluate.py --model facebook/dinov2-small --data path/to/images    # no head: cosine, nearest neighbours
accelerate launch recipes/evaluate.py --model ... --data imagenet-1k --batch_size 256    # every GPU of the machine
ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 -- recipes/evaluate.py --model ... --data ...    # two on a CPU
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..data.classes import AS_NUMBERS, match_labels
from ..data.images import ProcessedImages, collate, data_digest, load_images
from ..deploy.runtimes import RUNTIMES, check_runtime
from ..errors import BadValue, NoTrainedHead
from ..files import write_json
from ..hub.folder_card import refreshed_card
from ..models.auto import load_encoder, load_trained_classifier
from ..models.distances import POOLED_FEATURES, kl_to
from ..opening import load_processor
from ..programs.arguments import (
    LABEL_COLUMN_HELP,
    ImageArguments,
    at_least,
    one_of,
    option,
    parse_arguments,
    read_config,
)
from ..programs.conditions import data_name
from ..programs.identity import digest
from ..programs.lock import only_run_in, output_folder
from ..programs.processes import known_processes, say
from ..report.plots import picture_name, plot_accuracy
from ..report.tables import print_table
from .arguments import ResumableArguments
from .features import feature_rows, measure_features
from .metrics import CalibrationError, TopKAccuracy, bootstrap_interval
from .parts import Columns, Measure, measured
from .variants import Variant, median_speeds, run_in_turn


_RANKED = 5
_BINS = 15


@dataclass(kw_only=True)
class ClassifierArguments(ResumableArguments, ImageArguments):
    """An image classifier with several methods and amounts of merging."""

    # The end of the message for a model whose head would be random.
    headless: ClassVar[str] = "`dtem-hf evaluate` measures an encoder without a head by its features"

    r: list[str] = option("tokens merged per layer, one row each", default_factory=lambda: ["8", "13", "16", "20"])
    label_column: str | None = option(LABEL_COLUMN_HELP, default=None)
    proportional_attention: bool | None = option(
        "whether token sizes weigh attention, in all methods; left out, as in the adapter's and the methods' configs",
        default=None,
    )
    runtime: str = option(f"runtime of all rows: {', '.join(RUNTIMES)}", default="eager")
    output_dir: str = option("folder for evaluation.json and a plot", default="runs/evaluate")
    write_card: bool = option("write results and a new card into the adapter's folder", default=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "runtime", RUNTIMES)
        check_runtime(self, self.runtime)
        if self.write_card and (self.adapter is None or not os.path.isdir(self.adapter)):
            raise BadValue("write_card", self.write_card, f"an adapter that is a local folder, not {self.adapter!r}")

    def open(self) -> Measure:
        """Load the model, with the functions that measure it. Raises NoTrainedHead if its head would be random."""
        model = load_trained_classifier(self.model, self.headless, merge=None, dtype=getattr(torch, self.dtype))
        return Measure(model, model.config.num_labels, measure_batch, make_rows, {})


@dataclass(kw_only=True)
class EvaluateArguments(ClassifierArguments):
    """Evaluate a classifier, or an encoder by its features, with several methods and amounts of merging."""

    headless: ClassVar[str] = "its features are measured instead"

    features: str = option(
        f"measure these features instead of classes: {', '.join(POOLED_FEATURES[1:])}; auto: only for a model without "
        "a trained head, and then the first of these that its checkpoint holds",
        default="auto",
    )
    neighbours: int = option("number of nearest images, by features, that vote for a label", default=5)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "neighbours")
        one_of(self, "features", POOLED_FEATURES)

    def open(self) -> Measure:
        """Load the model; measure features if the user wants it, or, with a message, if the head would be random."""
        if self.features == "auto":
            try:
                return super().open()
            except NoTrainedHead as error:
                say(str(error))
        if self.runtime != "eager":
            raise BadValue("runtime", self.runtime, "eager: other runtimes do not measure features")
        return Measure(
            load_encoder(self.model, self.features, dtype=getattr(torch, self.dtype)),
            None,
            partial(measure_features, kind=self.features),
            partial(feature_rows, device=self.choose_device(), neighbours=self.neighbours),
            {"task": "image-feature-extraction", "features": self.features, "neighbours": self.neighbours},
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, evaluate, print the table, and write JSON and a plot."""
    arguments = parse_arguments(EvaluateArguments, argv, __doc__ or "")
    with only_run_in(arguments.output_dir) as output:
        if arguments.write_card:
            output = output_folder(str(arguments.adapter))

        def keep(result: dict[str, Any]) -> None:
            with refreshed_card(output) if arguments.write_card else nullcontext():
                write_json(output / "evaluation.json", result)
                plot_accuracy(result["rows"], output / picture_name(result["rows"]), title=result["model"]["name"])

        result = evaluate(arguments, keep)
        if known_processes().is_main_process:
            print_table(result)
            print(f"written: {output / 'evaluation.json'}, {output / picture_name(result['rows'])}")


def evaluate(
    arguments: ClassifierArguments, keep: Callable[[dict[str, Any]], None] = lambda result: None
) -> dict[str, Any]:
    """Measure every row on every image, and return the content of `evaluation.json`. Images are decoded once.

    With `accelerate launch` or torchrun the processes share the batches, and each returns the same result. Finished
    batches stay in `output_dir/parts` until `keep` has written the result, so the same command resumes.
    """
    a, device = arguments, arguments.choose_device()
    read_config(a.model)  # raises early if the model does not exist
    adapters = a.load_adapters()
    model, num_labels, measure, make, facts = a.open()
    weighing = {"proportional_attention": a.proportional_attention}
    images, processor = load_images(a.data, a.split, a.limit, a.label_column), load_processor(a.model)
    classes = AS_NUMBERS if num_labels is None else match_labels(images, model.config)
    processed = ProcessedImages(images, processor, num_labels=num_labels, classes=classes)
    shape = tuple(processed[0]["pixel_values"].shape)
    variants = a.make_variants(model.to(device).eval(), adapters, image_size=shape[-2:], **weighing)
    if a.runtime != "eager":
        variants = [variant.in_runtime(a.runtime, shape) for variant in variants]
    read = {"data": a.data, "split": a.split, "num_images": len(images), "images": data_digest(images)}
    read["classes"] = digest(classes.ids)
    run = a.run_facts(model, variants, adapters, processor, **read, runtime=a.runtime, **facts, **weighing)
    state = known_processes()
    measure_in_turn = partial(measure, variants, device)
    with measured(a, run, processed, measure_in_turn, "evaluate", collate) as columns:
        result = {
            **a.facts(model, device),
            **facts,
            "data": {
                "name": data_name(a.data),
                "num_images": len(images),
                "labelled": bool((columns["labels"] >= 0).any()),
                "labels": classes.how,
            },
            "image_size": list(shape[-2:]),
            "batch_size": a.batch_size,
            "processes": state.num_processes,
            "dtype": a.dtype,
            "runtime": a.runtime,
            **weighing,
            "rows": make(variants, columns),
        }
        if state.is_main_process:
            keep(result)
    return result


@torch.inference_mode()
def measure_batch(
    variants: Sequence[Variant], device: torch.device, batch: dict[str, Tensor], first: int = 0
) -> Columns:
    """Run all rows on a batch in turn, starting with row `first` modulo R.

    The first row shares the processor with the workers that decode the next batch, so `first` should change from batch
    to batch. Row 0 is the reference. Returns labels [B] and, for R rows, `ranked` classes [B, R, 5], `confidence` in
    the first class [B, R], `kl` from the reference [B, R] and `seconds_per_image` [1, R].
    """
    pixels = batch["pixel_values"].to(device=device, dtype=variants[0].model.dtype)
    logits, seconds = run_in_turn(variants, lambda model: model(pixel_values=pixels).logits.float(), device, first)
    columns = {
        "ranked": [row.topk(min(_RANKED, row.shape[-1]), dim=-1).indices for row in logits],
        "confidence": [row.double().softmax(-1).amax(-1) for row in logits],
        "kl": [kl_to(logits[0], row).double() for row in logits],
    }
    return {
        "labels": batch["labels"].numpy(),
        "seconds_per_image": seconds[None] / len(pixels),
        **{name: torch.stack(rows, dim=1).cpu().numpy() for name, rows in columns.items()},
    }


def make_rows(variants: Sequence[Variant], columns: Columns) -> list[dict[str, Any]]:
    """One dict per row, from the columns of all images: figures in percent, KL in nats, images per second.

    `change_interval` is the interval of the change of top-1 (without labels, of agreement) from the unmerged model.
    """
    labels, reference = columns["labels"], columns["ranked"][:, 0, 0]
    known = labels >= 0
    accuracy, calibration = TopKAccuracy(), CalibrationError()
    rows = []
    for i, (variant, (speed, speedup)) in enumerate(
        zip(variants, median_speeds(columns["seconds_per_image"]), strict=True)
    ):
        ranked, confidence, kl = (columns[name][:, i] for name in ("ranked", "confidence", "kl"))
        figures = {"top1": None, f"top{_RANKED}": None, "calibration_error": None}
        if known.any():
            widths = sorted({1, ranked.shape[1]})
            hits = accuracy.compute(predictions=ranked[known], references=labels[known], k=widths)
            found = (ranked[known, 0] == labels[known]).astype(np.int32)
            error = calibration.compute(predictions=confidence[known], references=found, num_bins=_BINS)
            figures = {"top1": hits["top1"], f"top{_RANKED}": hits[f"top{widths[-1]}"], **error}
        right = ranked[:, 0] == labels
        # The change from the unmerged model on each image, in percent: of top-1, or without labels of agreement.
        changes = 100.0 * (right - (reference == labels).astype(float))[known]
        changes = changes if known.any() else 100.0 * ((ranked[:, 0] == reference) - 1.0)
        figures["agreement"] = accuracy.compute(predictions=ranked[:, :1], references=reference, k=1)["top1"]
        rows.append(
            {
                **variant.facts(),
                **{name: None if value is None else 100 * value for name, value in figures.items()},
                "kl": math.fsum(kl) / len(kl),
                "change_interval": bootstrap_interval(changes),
                "kl_interval": bootstrap_interval(kl),
                "images_per_second": speed,
                "speedup": speedup,
                **variant.costs(),
            }
        )
    return rows
