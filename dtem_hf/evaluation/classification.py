"""Image classification: what merging costs in accuracy and saves in time, in one pass over the images.

python recipes/evaluate.py --model facebook/deit-small-patch16-224 --data path/to/images --adapter me/dtem-deit-small
python recipes/evaluate.py --model ... --data ... --methods tome --r 8 16 --limit 200    # a laptop's CPU
accelerate launch recipes/evaluate.py --model ... --data imagenet-1k --batch_size 256    # every GPU of the machine
ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 -- recipes/evaluate.py --model ... --data ...    # two on a CPU
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..data.images import ProcessedImages, collate, load_images, load_processor
from ..errors import BadValue
from ..files import write_json
from ..hub.adapter import MergeAdapter
from ..hub.folder_card import write_card
from ..models.auto import AutoModelForImageClassification
from ..programs.arguments import option, parse_arguments, parse_reduction
from ..programs.conditions import command, data_name, hardware, versions
from ..report.plots import plot_accuracy
from ..report.tables import print_table
from ..training.tasks.base import kl_to
from .metrics import load_metric
from .parts import Columns, Parts, batches_of, processes, weights_digest
from .variants import Variant, make_variants, method_names, run_in_turn


_RANKED = 5
_BINS = 15


@dataclass(kw_only=True)
class EvaluateArguments:
    """Evaluate an image classifier under several methods and amounts of merging."""

    model: str = option("classifier: Hub id or local folder")
    data: str = option("images: Hub dataset id, folder of class folders, or folder with labels.csv (file,label)")
    split: str = option("split of a Hub dataset", default="validation")
    limit: int | None = option("use only the first so many images", default=None)
    methods: list[str] = option(
        f"some of {', '.join(method_names())}", default_factory=lambda: ["none", "tome", "dtem"]
    )
    r: list[str] = option("tokens merged per layer, one row each", default_factory=lambda: ["8", "13", "16", "20"])
    flops: list[float] = option("shares of the multiply-adds to reach, one row each", default_factory=list)
    adapter: str | None = option(
        "trained adapter for dtem; left out, dtem starts from keys and equals tome", default=None
    )
    batch_size: int = option("images per batch", default=32)
    num_workers: int = option("processes that decode images", default=1)
    device: str = option("where to run; auto takes an accelerator if there is one", default="auto")
    dtype: str = option("float32, bfloat16 or float16", default="float32")
    output_dir: str = option("folder for evaluation.json and accuracy.png", default="runs/evaluate")
    resume: Literal["auto", "never"] = option(
        "auto: go on where an interrupted run in output_dir stopped; never: start over", default="auto"
    )
    write_card: bool = option("put the results into the adapter's folder and write its card anew", default=False)

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise BadValue("batch_size", self.batch_size, "1 or more")
        if self.limit is not None and self.limit < 1:
            raise BadValue("limit", self.limit, "1 or more")
        if self.write_card and (self.adapter is None or not os.path.isdir(self.adapter)):
            raise BadValue("write_card", self.write_card, f"an adapter that is a local folder, not {self.adapter!r}")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise BadValue("dtype", self.dtype, "float32, bfloat16 or float16")

    def adapter_references(self) -> list[str]:
        """The adapters that methods with an embedding are evaluated with; none: from keys."""
        return [] if self.adapter is None else [self.adapter]


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, evaluate, print the table, write JSON and plot."""
    arguments = parse_arguments(EvaluateArguments, argv, __doc__ or "")
    result = evaluate(arguments)
    if not processes().is_main_process:
        return
    output = Path(str(arguments.adapter) if arguments.write_card else arguments.output_dir)
    write_json(output / "evaluation.json", result)
    plot_accuracy(result["rows"], output / "accuracy.png", title=result["model"]["name"])
    if arguments.write_card:
        write_card(output, overwrite=True)
    print_table(result)
    print(f"written: {output / 'evaluation.json'}, {output / 'accuracy.png'}")


def evaluate(arguments: EvaluateArguments) -> dict[str, Any]:
    """Measure every row on every image; the images are decoded once. Returns what is written to `evaluation.json`.

    Under `accelerate launch` or torchrun the batches are shared out, and every process returns the same result. What
    is finished is kept in `output_dir/parts` until all of it is, so that the same command goes on where it stopped.
    """
    device = evaluation_device(arguments.device)
    adapters = {name: MergeAdapter.from_reference(name) for name in arguments.adapter_references()}
    model = AutoModelForImageClassification.from_pretrained(
        arguments.model, merge=None, dtype=getattr(torch, arguments.dtype)
    ).to(device)
    reductions = [parse_reduction(text) for text in arguments.r]
    variants = make_variants(model, arguments.methods, reductions, arguments.flops, adapters)
    images = load_images(arguments.data, arguments.split, arguments.limit)
    processed = ProcessedImages(images, load_processor(arguments.model), num_labels=model.config.num_labels)
    run = {
        "rows": [[variant.method, variant.shown_r, variant.adapter] for variant in variants],
        "weights": {
            "model": weights_digest(model.state_dict()),
            **{name: weights_digest(adapter.tensors) for name, adapter in adapters.items()},
        },
        "data": [arguments.data, arguments.split, len(images)],
        "batch_size": arguments.batch_size,
        "dtype": arguments.dtype,
    }
    parts = Parts(Path(arguments.output_dir) / "parts", run, arguments.resume)
    batches = batches_of(len(images), arguments.batch_size)
    measure(variants, processed, batches, parts, device, arguments.num_workers)
    rows = make_rows(variants, parts.read(len(batches)))
    parts.state.wait_for_everyone()
    if parts.state.is_main_process:
        parts.remove()
    return {
        "command": command(),
        "model": describe_model(arguments.model, model),
        "adapter": arguments.adapter,
        "data": {
            "name": data_name(arguments.data),
            "num_images": len(images),
            "labelled": rows[0]["top1"] is not None,
        },
        "image_size": list(processed[0]["pixel_values"].shape[-2:]),
        "batch_size": arguments.batch_size,
        "processes": parts.state.num_processes,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "hardware": hardware(device),
        "dtype": arguments.dtype,
        "versions": versions(),
        "rows": rows,
    }


def describe_model(name: str, model: Any) -> dict[str, Any]:
    """What a record says of a model; of a local folder, its last part."""
    return {
        "name": os.path.basename(os.path.normpath(name)) if os.path.isdir(name) else name,
        "model_type": model.config.model_type,
        "num_parameters": model.num_parameters(),
    }


def evaluation_device(name: str) -> torch.device:
    """The device of this process; `auto` takes an accelerator if there is one."""
    return processes().device if name == "auto" else torch.device(name)


def measure(
    variants: Sequence[Variant],
    images: ProcessedImages,
    batches: Sequence[Sequence[int]],
    parts: Parts,
    device: torch.device,
    num_workers: int = 0,
) -> None:
    """Run all rows on each unfinished batch that falls to this process, and keep what comes of it in `parts`.

    Batches are the same for any number of processes, so their figures are, too. The first one of a process warms up
    and is not timed, nor is a last one of another size.
    """
    mine = parts.share(len(batches))
    loader = DataLoader(
        images, batch_sampler=[list(batches[number]) for number in mine], collate_fn=collate, num_workers=num_workers
    )
    shown = parts.state.is_main_process
    progress = tqdm(loader, desc="evaluate", unit="batch", disable=not shown)
    if shown and len(parts.finished()):
        progress.write(f"{len(parts.finished())} of {len(batches)} batches were finished before")
    for place, (number, batch) in enumerate(zip(mine, progress, strict=True)):
        columns = measure_batch(variants, batch, device, first=number % len(variants))
        if place == 0 or len(batches[number]) < len(batches[0]):
            columns["seconds_per_image"][:] = math.nan
        parts.write(number, columns)
    parts.state.wait_for_everyone()


@torch.inference_mode()
def measure_batch(
    variants: Sequence[Variant], batch: dict[str, Tensor], device: torch.device, first: int = 0
) -> Columns:
    """Run all rows on a batch in turn, from row `first` on: whoever runs first shares the processor with whatever
    decodes the next batch, and that must not always be the same one.

    Row 0 is the reference. Returns labels [B] and, for each of R rows, `ranked` classes [R, B, 5], `confidence` in the
    first of them [R, B], `kl` to the reference [R, B] and `seconds_per_image` [R].
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
        "seconds_per_image": seconds / len(pixels),
        **{name: torch.stack(rows).cpu().numpy() for name, rows in columns.items()},
    }


def make_rows(variants: Sequence[Variant], parts: Sequence[Columns]) -> list[dict[str, Any]]:
    """One dict per row, from the columns of all batches: figures in percent, KL in nats, images per second."""
    labels = np.concatenate([part["labels"] for part in parts])
    reference = np.concatenate([part["ranked"][0, :, 0] for part in parts])
    accuracy, calibration = load_metric("top_k_accuracy"), load_metric("calibration_error")
    rows: list[dict[str, Any]] = []
    for i, variant in enumerate(variants):
        ranked, confidence, kl = (
            np.concatenate([part[name][i] for part in parts]) for name in ("ranked", "confidence", "kl")
        )
        known = labels >= 0
        figures = {"top1": None, f"top{_RANKED}": None, "calibration_error": None}
        if known.any():
            widths = sorted({1, ranked.shape[1]})
            hits = accuracy.compute(predictions=ranked[known], references=labels[known], k=widths)
            right = (ranked[known, 0] == labels[known]).astype(np.int32)
            error = calibration.compute(predictions=confidence[known], references=right, num_bins=_BINS)
            figures = {"top1": hits["top1"], f"top{_RANKED}": hits[f"top{widths[-1]}"], **error}
        agreement = accuracy.compute(predictions=ranked[:, :1], references=reference, k=1)["top1"]
        figures = {name: None if value is None else 100 * value for name, value in figures.items()}
        seconds = np.array([part["seconds_per_image"][i] for part in parts])
        seconds = seconds[~np.isnan(seconds)]
        speed = float(1 / np.median(seconds)) if len(seconds) else None
        plain = rows[0]["images_per_second"] if rows else speed
        rows.append(
            {
                "method": variant.method,
                "r": variant.shown_r,
                **({} if variant.adapter is None else {"adapter": variant.adapter}),
                **figures,
                "agreement": 100 * agreement,
                "kl": math.fsum(kl) / len(kl),
                "images_per_second": speed,
                "speedup": speed / plain if plain and speed else None,
                "multiply_adds": variant.plan.multiply_adds,
                "ratio": variant.plan.ratio,
                "tokens": variant.plan.tokens[-1],
            }
        )
    return rows
