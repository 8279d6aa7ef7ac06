"""Score the captions that a model writes, with and without merging.

python recipes/evaluate_captions.py --model microsoft/git-base-coco --images coco --annotations dataset_coco.json \\
    --split test --methods tome --r 4 8 12
python recipes/evaluate_captions.py --annotations captions_val2014.json --predictions results.json --output scores.json
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from ..data.captioned_images import ImageFolder
from ..data.captions import read_annotations, read_predictions, write_predictions
from ..errors import BadValue, check_number
from ..files import write_json
from ..models.auto import auto_class, load_whole
from ..opening import load_processor
from ..programs.arguments import at_least, option, parse_arguments, read_config
from ..programs.conditions import command, data_name
from ..programs.identity import digest
from ..programs.lock import only_run_in, output_folder
from ..programs.processes import known_processes
from ..report.tables import print_table
from .arguments import METHODS_HELP, ResumableArguments
from .captions_generation import caption_batch, count_generation
from .captions_scoring import SPICE_VARIABLE, score_captions, unavailable
from .parts import Columns, measured
from .variants import Variant, median_speeds


@dataclass(kw_only=True)
class EvaluateCaptionsArguments(ResumableArguments):
    """Let a model caption images, and score its captions; or score given predictions."""

    annotations: str = option("references: COCO's annotation format, or Karpathy's dataset_coco.json")
    split: str | None = option("split of Karpathy's file: train, restval, val or test", default=None)
    predictions: str | None = option("captions to score instead of a model's, in COCO's result format", default=None)
    output: str = option("file for the scores of predictions", default="runs/captions/scores.json")
    spice_jars: str | None = option(
        f"folder with SPICE's two CoreNLP jars; left out: {SPICE_VARIABLE}, or SPICE's own folder", default=None
    )
    model: str | None = option("captioning model: Hub id or local folder", default=None)  # type: ignore[assignment]
    images: str | None = option("folder of the annotated images", default=None)
    methods: list[str] = option(METHODS_HELP, default_factory=lambda: ["none", "tome"])
    num_beams: int = option("beams of the search; 1 is greedy", default=4)
    length_penalty: float = option("exponent of the caption length that divides a beam's score", default=0.6)
    max_new_tokens: int = option("longest caption, in tokens", default=20)
    batch_size: int = option("images per batch", default=16)
    output_dir: str = option("folder for captions.json and one result file per row", default="runs/captions")

    def __post_init__(self) -> None:
        if (self.predictions is None) == (self.model is None):
            raise BadValue("model, predictions", (self.model, self.predictions), "exactly one of them")
        if self.model is not None and self.images is None:
            raise BadValue("images", None, "the folder of the annotated images")
        super().__post_init__()
        at_least(self, 1, "num_beams", "max_new_tokens")
        check_number("length_penalty", self.length_penalty, -1e3, 1e3)

    def generation(self) -> dict[str, Any]:
        """The options of `generate`; a greedy search has no length penalty."""
        beams = {} if self.num_beams == 1 else {"length_penalty": self.length_penalty}
        return {"num_beams": self.num_beams, **beams, "max_new_tokens": self.max_new_tokens, "do_sample": False}


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line; caption and score, or only score; print and write the scores."""
    arguments = parse_arguments(EvaluateCaptionsArguments, argv, __doc__ or "")
    for metric, reason in unavailable(arguments.spice_jars).items():
        print(f"{metric} will be null: {reason}")
    if arguments.predictions is not None:
        output_folder(Path(arguments.output).parent)
        write_json(arguments.output, score_file(arguments))
        print(f"written: {arguments.output}")
        return
    with only_run_in(arguments.output_dir) as folder:
        path = folder / "captions.json"
        result = evaluate_captions(arguments, lambda result: write_json(path, result))
        if known_processes().is_main_process:
            print_table(result)
            for metric, reason in result["reasons"].items():
                print(f"{metric}: {reason}")
            print(f"written: {path}, and the captions of every row beside it")


def score_file(arguments: EvaluateCaptionsArguments) -> dict[str, Any]:
    """Score a result file and return the record: one key per metric, and `reasons` for the metrics that are null."""
    assert arguments.predictions is not None
    images = read_annotations(arguments.annotations, arguments.split)
    predictions = read_predictions(arguments.predictions)
    if len(predictions) < len(images):
        print(f"{len(predictions)} of {len(images)} images have a prediction; only these are scored")
    references = {image_id: image.captions for image_id, image in images.items()}
    scores = score_captions(references, predictions, arguments.spice_jars)
    for metric, value in scores.values.items():
        print(f"{metric:>8}  {f'null: {scores.reasons[metric]}' if value is None else f'{value:.4f}'}")
    return {
        **scores.values,
        "reasons": scores.reasons,
        "num_images": len(predictions),
        "num_annotated_images": len(images),
        "predictions": Path(arguments.predictions).name,
        "command": command(),
    }


def evaluate_captions(
    arguments: EvaluateCaptionsArguments, keep: Callable[[dict[str, Any]], None] = lambda result: None
) -> dict[str, Any]:
    """Caption every image with every row, write COCO result files, score them, and return `captions.json`.

    Several processes share the batches; only the first process scores and returns a result. Finished batches stay in
    `output_dir/parts` until `keep` has written the result.
    """
    a, device = arguments, arguments.choose_device()
    assert a.model is not None and a.images is not None
    config = read_config(a.model)
    model = load_whole(auto_class(config), a.model, merge=None, dtype=getattr(torch, a.dtype)).to(device).eval()
    adapters = a.load_adapters()
    variants = a.make_variants(model, adapters)
    annotated = dict(list(read_annotations(a.annotations, a.split).items())[: a.limit])
    images = ImageFolder(annotated, Path(a.images), load_processor(a.model))
    tokenizer, settings = AutoTokenizer.from_pretrained(a.model), a.generation()
    words = digest(tokenizer.get_vocab())
    read = {"split": a.split, "num_images": len(images), "images": images.digest()}
    run = a.run_facts(model, variants, adapters, images.processor, **read, settings=settings, tokenizer=words)
    state, result = known_processes(), dict[str, Any]()
    measure = partial(caption_batch, variants, tokenizer, settings, device)
    with measured(a, run, images, measure, "caption") as columns:
        if not state.is_main_process:
            return result
        one = images[0]["pixel_values"][None].to(device, model.dtype)
        costs = [count_generation(variant, one, settings) for variant in variants]
        rows, reasons = _score_rows(a, variants, columns, {i: image.captions for i, image in annotated.items()})
        result = {
            **a.facts(model, device),
            "data": {"name": data_name(a.images), "num_images": len(images)},
            "generation": settings,
            "batch_size": a.batch_size,
            "processes": state.num_processes,
            "dtype": a.dtype,
            "reasons": reasons,
            "rows": [{**row, **cost} for row, cost in zip(rows, costs, strict=True)],
        }
        keep(result)
    return result


def _score_rows(
    arguments: EvaluateCaptionsArguments,
    variants: Sequence[Variant],
    columns: Columns,
    references: Mapping[int, Sequence[str]],
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Write every row's result file; returns the rows with scores and speeds, and the reasons for null metrics."""
    rows: list[dict[str, Any]] = []
    speeds = median_speeds(columns["seconds_per_image"])
    for i, (variant, (speed, speedup)) in enumerate(zip(variants, speeds, strict=True)):
        predictions = dict(zip(columns["image_id"].tolist(), columns["captions"][:, i].tolist(), strict=True))
        file_name = f"results_{re.sub(r'[^A-Za-z0-9.]+', '-', variant.label).strip('-')}.json"
        write_predictions(Path(arguments.output_dir) / file_name, predictions)
        scores = score_captions(references, predictions, arguments.spice_jars)
        rows.append(
            {
                **variant.facts(),
                **scores.values,
                "visual_tokens": variant.plan.output_tokens,  # CLS included
                "captions_per_second": speed,
                "speedup": speedup,
                "results": file_name,
            }
        )
    return rows, scores.reasons
