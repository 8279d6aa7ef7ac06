"""Captions: what merging does to the text that a model writes about images.

python recipes/evaluate_captions.py --model microsoft/git-base-coco --images coco --annotations dataset_coco.json \\
    --split test --methods tome --r 4 8 12
python recipes/evaluate_captions.py --annotations captions_val2014.json --predictions results.json --output scores.json
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoTokenizer

from ..data.captions import read_annotations, read_predictions, write_predictions
from ..data.images import load_processor
from ..errors import BadValue
from ..files import write_json
from ..hub.adapter import MergeAdapter
from ..labels import reduction_label
from ..models.auto import auto_class
from ..programs.arguments import option, parse_arguments, parse_reduction
from ..programs.conditions import command, data_name, hardware, versions
from .captions_generation import CaptionImages, count_generation, generate_captions
from .captions_scoring import METRICS, SPICE_VARIABLE, CaptionScores, score_captions, unavailable
from .classification import describe_model, evaluation_device
from .parts import Parts, batches_of, processes, weights_digest
from .variants import Variant, make_variants, method_names


@dataclass(kw_only=True)
class EvaluateCaptionsArguments:
    """Let a model caption images and score what it writes; or, with predictions, score those."""

    annotations: str = option("references: COCO's annotation format, or Karpathy's dataset_coco.json")
    split: str | None = option("split of Karpathy's file: train, restval, val or test", default=None)
    predictions: str | None = option("captions to score, in COCO's result format, instead of a model's", default=None)
    output: str = option("file for the scores of predictions", default="runs/captions/scores.json")
    spice_jars: str | None = option(
        f"folder with SPICE's two CoreNLP jars; left out: {SPICE_VARIABLE}, or beside SPICE itself", default=None
    )
    model: str | None = option("captioning model: Hub id or local folder", default=None)
    images: str | None = option("folder of the annotated images", default=None)
    limit: int | None = option("use only the first so many images", default=None)
    methods: list[str] = option(f"some of {', '.join(method_names())}", default_factory=lambda: ["none", "tome"])
    r: list[str] = option("tokens merged per layer, one row each", default_factory=lambda: ["4", "8", "12"])
    flops: list[float] = option("shares of the encoder's multiply-adds to reach, one row each", default_factory=list)
    adapter: str | None = option("trained adapter for dtem: Hub id or local folder", default=None)
    num_beams: int = option("beams of the search; 1 is greedy", default=4)
    length_penalty: float = option("power of the length that a beam's score is divided by", default=0.6)
    max_new_tokens: int = option("longest caption, in tokens", default=20)
    batch_size: int = option("images per batch", default=16)
    num_workers: int = option("processes that decode images", default=1)
    device: str = option("where to run; auto takes an accelerator if there is one", default="auto")
    dtype: str = option("float32, bfloat16 or float16", default="float32")
    output_dir: str = option("folder for captions.json and one result file per row", default="runs/captions")
    resume: Literal["auto", "never"] = option(
        "auto: go on where an interrupted run in output_dir stopped; never: start over", default="auto"
    )

    def __post_init__(self) -> None:
        if (self.predictions is None) == (self.model is None):
            raise BadValue("model, predictions", (self.model, self.predictions), "exactly one of them")
        if self.model is not None and self.images is None:
            raise BadValue("images", None, "the folder of the annotated images")
        for name in ("num_beams", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise BadValue(name, getattr(self, name), "1 or more")
        if self.limit is not None and self.limit < 1:
            raise BadValue("limit", self.limit, "1 or more")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise BadValue("dtype", self.dtype, "float32, bfloat16 or float16")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line; caption and score, or score alone; print and write the scores."""
    arguments = parse_arguments(EvaluateCaptionsArguments, argv, __doc__ or "")
    for metric, reason in unavailable(arguments.spice_jars).items():
        print(f"{metric} will be null: {reason}")
    if arguments.predictions is not None:
        write_json(arguments.output, score_file(arguments))
        print(f"written: {arguments.output}")
        return
    result = evaluate_captions(arguments)
    if processes().is_main_process:
        path = Path(arguments.output_dir) / "captions.json"
        write_json(path, result)
        print_table(result)
        print(f"written: {path}, and the captions of every row beside it")


def score_file(arguments: EvaluateCaptionsArguments) -> dict[str, Any]:
    """Score a result file; returns what is written: one key per metric, `reasons` for those that are null."""
    assert arguments.predictions is not None
    images = read_annotations(arguments.annotations, arguments.split)
    predictions = read_predictions(arguments.predictions)
    if len(predictions) < len(images):
        print(f"{len(predictions)} of {len(images)} images have a prediction; those are scored")
    references = {image_id: image.captions for image_id, image in images.items()}
    scores = score_captions(references, predictions, arguments.spice_jars)
    print_scores(scores)
    return {
        **scores.to_dict(),
        "num_images": len(predictions),
        "num_annotated_images": len(images),
        "predictions": Path(arguments.predictions).name,
        "command": command(),
    }


def evaluate_captions(arguments: EvaluateCaptionsArguments) -> dict[str, Any]:
    """Caption every image by every row, write COCO result files, score them; returns `captions.json`.

    Several processes share the batches; what is finished is kept until all of it is.
    """
    assert arguments.model is not None and arguments.images is not None
    device = evaluation_device(arguments.device)
    config = AutoConfig.from_pretrained(arguments.model, trust_remote_code=False)
    model = auto_class(config).from_pretrained(arguments.model, merge=None, dtype=getattr(torch, arguments.dtype))
    model = model.to(device).eval()
    adapters = {}
    if arguments.adapter is not None:
        adapters[arguments.adapter] = MergeAdapter.from_reference(arguments.adapter)
    reductions = [parse_reduction(text) for text in arguments.r]
    variants = make_variants(model, arguments.methods, reductions, arguments.flops, adapters)
    annotated = read_annotations(arguments.annotations, arguments.split)
    annotated = dict(list(annotated.items())[: arguments.limit])
    images = CaptionImages(annotated, Path(arguments.images), load_processor(arguments.model))
    settings = {
        "num_beams": arguments.num_beams,
        "length_penalty": arguments.length_penalty,
        "max_new_tokens": arguments.max_new_tokens,
        "do_sample": False,
    }
    if arguments.num_beams == 1:
        del settings["length_penalty"]  # which greedy search has no use for, and warns of
    run = {
        "rows": [[variant.method, variant.shown_r, variant.adapter] for variant in variants],
        "weights": {
            "model": weights_digest(model.state_dict()),
            **{name: weights_digest(adapter.tensors) for name, adapter in adapters.items()},
        },
        "images": sorted(annotated),
        "settings": settings,
        "batch_size": arguments.batch_size,
        "dtype": arguments.dtype,
    }
    parts = Parts(Path(arguments.output_dir) / "parts", run, arguments.resume)
    batches = batches_of(len(images), arguments.batch_size)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    generate_captions(variants, images, batches, parts, tokenizer, settings, device, arguments.num_workers)
    # Scores are computed by one process; the others have nothing to return.
    if not parts.state.is_main_process:
        return {}
    one = images[0]["pixel_values"][None].to(device, model.dtype)
    columns = parts.read(len(batches))
    rows: list[dict[str, Any]] = []
    for i, variant in enumerate(variants):
        predictions = {
            int(image_id): str(text)
            for part in columns
            for image_id, text in zip(part["image_id"], part["captions"][i], strict=True)
        }
        file_name = f"results_{re.sub(r'[^A-Za-z0-9.]+', '-', variant.label).strip('-')}.json"
        write_predictions(Path(arguments.output_dir) / file_name, predictions)
        references = {image_id: image.captions for image_id, image in annotated.items()}
        scores = score_captions(references, predictions, arguments.spice_jars)
        seconds = np.array([part["seconds_per_image"][i] for part in columns])
        rows.append(_row(variant, scores, seconds, rows[0] if rows else None) | {"results": file_name})
        rows[-1].update(count_generation(variant, one, settings))
    parts.remove()
    return {
        "command": command(),
        "model": describe_model(arguments.model, model),
        "adapter": arguments.adapter,
        "data": {"name": data_name(arguments.images), "num_images": len(images)},
        "generation": settings,
        "batch_size": arguments.batch_size,
        "processes": parts.state.num_processes,
        "hardware": hardware(device),
        "dtype": arguments.dtype,
        "versions": versions(),
        "reasons": scores.reasons,
        "rows": rows,
    }


def _row(variant: Variant, scores: CaptionScores, seconds: np.ndarray, plain: dict[str, Any] | None) -> dict[str, Any]:
    timed = seconds[~np.isnan(seconds)]
    speed = float(1 / np.median(timed)) if len(timed) else None
    reference = speed if plain is None else plain["captions_per_second"]
    return {
        "method": variant.method,
        "r": variant.shown_r,
        **scores.values,
        "visual_tokens": variant.plan.output_tokens,  # what the decoder is handed, CLS included
        "captions_per_second": speed,
        "speedup": speed / reference if speed and reference else None,
    }


def print_scores(scores: CaptionScores) -> None:
    """One line per metric: the score, or why there is none."""
    for metric in METRICS:
        value = scores.values[metric]
        print(f"{metric:>8}  {f'null: {scores.reasons[metric]}' if value is None else f'{value:.4f}'}")


def print_table(result: dict[str, Any]) -> None:
    """Show the rows of a caption evaluation in the terminal, and why a metric is missing."""
    table = Table(
        title=f"{result['model']['name']} on {result['data']['num_images']} images of {result['data']['name']}"
    )
    shown = ("BLEU-1", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr", "SPICE")
    for column in ("method", "r", *shown, "visual tokens", "M encoder", "M decoding", "captions/s"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in result["rows"]:
        scores = ["–" if row[name] is None else f"{100 * row[name]:.1f}" for name in shown]
        costs = [f"{row[f'{part}_multiply_adds'] / 1e6:.1f}" for part in ("encoder", "decoding")]
        speed = "–" if row["captions_per_second"] is None else f"{row['captions_per_second']:.1f}"
        r = "" if row["r"] is None else reduction_label(row["r"])
        table.add_row(row["method"], r, *scores, str(row["visual_tokens"]), *costs, speed)
    console = Console(width=140)
    console.print(table)
    for metric, reason in result["reasons"].items():
        console.print(f"{metric}: {reason}")
