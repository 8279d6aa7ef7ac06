"""Captions: what merging does to the text that a model writes about COCO's images.

python recipes/evaluate_captions.py --annotations captions_val2014.json --predictions results.json --output scores.json
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..arguments import option, parse_arguments
from ..conditions import command
from ..files import write_json
from .captions_format import read_annotations, read_predictions
from .captions_scoring import METRICS, SPICE_VARIABLE, CaptionScores, score_captions


@dataclass(kw_only=True)
class EvaluateCaptionsArguments:
    """Score captions in COCO's result format."""

    annotations: str = option("references: COCO's annotation format, or Karpathy's dataset_coco.json")
    predictions: str = option("captions to score: COCO's result format")
    split: str | None = option("split of Karpathy's file: train, restval, val or test", default=None)
    output: str = option("file for the scores", default="runs/captions/scores.json")
    spice_jars: str | None = option(
        f"folder with SPICE's two CoreNLP jars; left out: {SPICE_VARIABLE}, or beside SPICE itself", default=None
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, score, print the scores, write them."""
    arguments = parse_arguments(EvaluateCaptionsArguments, argv, __doc__ or "")
    result = score_file(arguments)
    write_json(arguments.output, result)
    print(f"written: {arguments.output}")


def score_file(arguments: EvaluateCaptionsArguments) -> dict[str, Any]:
    """Score a result file; returns what is written: one key per metric, `reasons` for those that are null."""
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


def print_scores(scores: CaptionScores) -> None:
    """One line per metric: the score, or why there is none."""
    for metric in METRICS:
        value = scores.values[metric]
        print(f"{metric:>8}  {f'null: {scores.reasons[metric]}' if value is None else f'{value:.4f}'}")
