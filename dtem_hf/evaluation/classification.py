"""Image classification: what merging costs in accuracy and saves in time, in one pass over the images.

python recipes/evaluate.py --model facebook/deit-small-patch16-224 --data path/to/images --adapter me/dtem-deit-small
python recipes/evaluate.py --model ... --data ... --methods tome --r 8 16 --limit 200    # a laptop's CPU
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..adapter import MergeAdapter
from ..analysis.plots import plot_accuracy
from ..arguments import option, parse_arguments, parse_reduction
from ..auto import AutoModelForImageClassification
from ..card import write_card
from ..conditions import command, data_name, hardware, versions
from ..data import ProcessedImages, collate, load_images, load_processor
from ..errors import BadValue
from ..files import write_json
from ..training.tasks.base import kl_to
from .tables import print_table
from .variants import Variant, make_variants


@dataclass(kw_only=True)
class EvaluateArguments:
    """Evaluate an image classifier under several methods and amounts of merging."""

    model: str = option("classifier: Hub id or local folder")
    data: str = option("images: Hub dataset id, folder of class folders, or folder with labels.csv (file,label)")
    split: str = option("split of a Hub dataset", default="validation")
    limit: int | None = option("use only the first so many images", default=None)
    methods: list[str] = option("some of none, tome, dtem", default_factory=lambda: ["none", "tome", "dtem"])
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


@dataclass
class Tally:
    """What one row adds up to over the images."""

    images: int = 0
    labelled: int = 0
    top1: int = 0
    top5: int = 0
    agreement: int = 0
    kl: float = 0.0
    seconds_per_image: list[float] = field(default_factory=list)

    def add(self, logits: Tensor, reference: Tensor, labels: Tensor) -> None:
        """Count a batch: logits [B, classes] of the row and of the unmerged model, labels [B] (-1: none)."""
        known = labels >= 0
        best = logits.topk(min(5, logits.shape[-1]), dim=-1).indices
        hits = best == labels.unsqueeze(-1)
        self.images += len(labels)
        self.labelled += int(known.sum())
        self.top1 += int((hits[:, 0] & known).sum())
        self.top5 += int((hits.any(-1) & known).sum())
        self.agreement += int((best[:, 0] == reference.argmax(-1)).sum())
        self.kl += float(kl_to(reference, logits).double().sum())

    def figures(self) -> dict[str, Any]:
        """Percentages, KL in nats, and images per second by the median batch."""
        speed = 1 / statistics.median(self.seconds_per_image) if self.seconds_per_image else None
        return {
            "top1": 100 * self.top1 / self.labelled if self.labelled else None,
            "top5": 100 * self.top5 / self.labelled if self.labelled else None,
            "agreement": 100 * self.agreement / self.images,
            "kl": self.kl / self.images,
            "images_per_second": speed,
        }


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, evaluate, print the table, write JSON and plot."""
    arguments = parse_arguments(EvaluateArguments, argv, __doc__ or "")
    result = evaluate(arguments)
    output = Path(str(arguments.adapter) if arguments.write_card else arguments.output_dir)
    write_json(output / "evaluation.json", result)
    plot_accuracy(result["rows"], output / "accuracy.png", title=result["model"]["name"])
    if arguments.write_card:
        write_card(output, overwrite=True)
    print_table(result)
    print(f"written: {output / 'evaluation.json'}, {output / 'accuracy.png'}")


def evaluate(arguments: EvaluateArguments) -> dict[str, Any]:
    """Measure every row on every image; the images are decoded once. Returns what is written to `evaluation.json`."""
    device = torch.device(_device(arguments.device))
    adapter = MergeAdapter.from_reference(arguments.adapter) if arguments.adapter is not None else None
    model = AutoModelForImageClassification.from_pretrained(
        arguments.model, merge=None, dtype=getattr(torch, arguments.dtype)
    ).to(device)
    reductions = [parse_reduction(text) for text in arguments.r]
    variants = make_variants(model, arguments.methods, reductions, arguments.flops, adapter)
    images = load_images(arguments.data, arguments.split, arguments.limit)
    processed = ProcessedImages(images, load_processor(arguments.model), num_labels=model.config.num_labels)
    loader = DataLoader(
        processed, batch_size=arguments.batch_size, collate_fn=collate, num_workers=arguments.num_workers
    )
    rows = measure(variants, tqdm(loader, desc="evaluate", unit="batch"), device)
    return {
        "command": command(),
        "model": {
            "name": os.path.basename(os.path.normpath(arguments.model))
            if os.path.isdir(arguments.model)
            else arguments.model,
            "model_type": model.config.model_type,
            "num_parameters": model.num_parameters(),
        },
        "adapter": arguments.adapter,
        "data": {
            "name": data_name(arguments.data),
            "num_images": len(images),
            "labelled": rows[0]["top1"] is not None,
        },
        "image_size": list(processed[0]["pixel_values"].shape[-2:]),
        "batch_size": arguments.batch_size,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "hardware": hardware(device),
        "dtype": arguments.dtype,
        "versions": versions(),
        "rows": rows,
    }


@torch.inference_mode()
def measure(
    variants: Sequence[Variant], batches: Iterable[dict[str, Tensor]], device: torch.device
) -> list[dict[str, Any]]:
    """Run all rows on each batch in turn, so that what else the machine does falls on all of them; one dict per row.

    The first row is the reference. The first batch warms up and is not timed, nor is a last one of another size.
    """
    tallies = [Tally() for _ in variants]
    full = None
    for number, batch in enumerate(batches):
        pixels = batch["pixel_values"].to(device=device, dtype=variants[0].model.dtype)
        labels = batch["labels"].to(device)
        full = len(labels) if full is None else full
        reference = None
        for variant, tally in zip(variants, tallies, strict=True):
            with variant.ready() as model:
                _wait(device)
                started = time.perf_counter()
                logits = model(pixel_values=pixels).logits
                _wait(device)
                seconds = time.perf_counter() - started
            logits = logits.float()
            reference = logits if reference is None else reference
            tally.add(logits, reference, labels)
            if number and len(labels) == full:
                tally.seconds_per_image.append(seconds / full)
    if full is None:
        raise BadValue("data", 0, "at least one image")
    return _rows(variants, tallies)


def _rows(variants: Sequence[Variant], tallies: Sequence[Tally]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for variant, tally in zip(variants, tallies, strict=True):
        figures = tally.figures()
        plain = rows[0]["images_per_second"] if rows else figures["images_per_second"]
        rows.append(
            {
                "method": variant.method,
                "r": variant.shown_r,
                **figures,
                "speedup": figures["images_per_second"] / plain if plain else None,
                "multiply_adds": variant.plan.multiply_adds,
                "ratio": variant.plan.ratio,
                "tokens": variant.plan.tokens[-1],
            }
        )
    return rows


def _device(name: str) -> str:
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
