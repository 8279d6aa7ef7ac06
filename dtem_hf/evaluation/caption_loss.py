"""Measure a merged captioning model by its loss on reference captions of images that training held out.

python recipes/evaluate_caption_loss.py --model runs/small-git --images path/to/flickr8k --captions captions.txt \\
    --hold_out 200 --r 4 8 12 --adapter runs/small-git-dtem/adapter
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from ..data.captioned_images import MODEL_INPUTS, CaptionCollate, CaptionedImages, Images, hold_out
from ..data.captions import read_annotations
from ..files import write_json
from ..models.auto import auto_class, load_whole
from ..models.distances import caption_losses
from ..opening import load_processor
from ..programs.arguments import at_least, option, parse_arguments, read_config
from ..programs.conditions import data_name
from ..programs.lock import output_folder
from ..progress import tqdm
from ..report.tables import print_table
from .arguments import METHODS_HELP, RowArguments
from .variants import run_in_turn


@dataclass(kw_only=True)
class CaptionLossArguments(RowArguments):
    """Measure a captioning model's loss with several methods and amounts of merging."""

    images: str = option("folder of the captioned images")
    captions: str = option("COCO's annotations, Karpathy's JSON, or a table of image and caption")
    split: str | None = option("split of Karpathy's file: train, restval, val or test", default=None)
    hold_out: int | None = option("use only the images that training with this validation_size held out", default=None)
    methods: list[str] = option(METHODS_HELP, default_factory=lambda: ["tome", "dtem"])
    max_caption_tokens: int = option("largest length of captions in tokens; longer captions are cut", default=40)
    batch_size: int = option("captions per batch", default=32)
    output: str = option("file for the result", default="runs/caption_loss.json")

    def __post_init__(self) -> None:
        at_least(self, 1, "batch_size", "hold_out")
        at_least(self, 2, "max_caption_tokens")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print and write the result."""
    arguments = parse_arguments(CaptionLossArguments, argv, __doc__ or "")
    output_folder(Path(arguments.output).parent)
    result = evaluate_caption_loss(arguments)
    write_json(arguments.output, result)
    print_table(result)
    for each in result["comparisons"]:
        difference = f"{each['dtem_minus_tome']:+.4f} ± {each['standard_error']:.4f}"
        print(f"r={each['r']}: DTEM − ToMe = {difference} nats per token")
    print(f"written: {arguments.output}")


@torch.inference_mode()
def evaluate_caption_loss(arguments: CaptionLossArguments) -> dict[str, Any]:
    """Measure every row's mean loss per caption (nats per token), and DTEM's loss minus ToMe's at the same r."""
    a, device = arguments, arguments.choose_device()
    config = read_config(a.model)
    model = load_whole(auto_class(config), a.model, merge=None).to(device).eval()
    variants = a.make_variants(model, a.load_adapters())
    images: Images = read_annotations(a.captions, a.split)
    if a.hold_out is not None:
        _, images = hold_out(images, a.hold_out)
    data = CaptionedImages(images, Path(a.images), load_processor(a.model), every_caption=True)
    collate = CaptionCollate(
        AutoTokenizer.from_pretrained(a.model), {"max_length": a.max_caption_tokens, "padding": True}
    )
    parts: list[list[torch.Tensor]] = [[] for _ in variants]
    for batch in tqdm(DataLoader(data, a.batch_size, collate_fn=collate), desc="captions", unit="batch"):
        inputs = {name: batch[name].to(device) for name in MODEL_INPUTS}
        outputs, _ = run_in_turn(variants, lambda merged: merged(**inputs).logits, device)  # noqa: B023 (run at once)
        for part, logits in zip(parts, outputs, strict=True):
            part.append(caption_losses(logits, batch["labels"].to(device)).double().cpu())
    losses = [torch.cat(part) for part in parts]
    rows = [
        {
            **variant.facts(),
            "visual_tokens": variant.plan.output_tokens,
            "ratio": variant.plan.ratio,
            "loss": own.nanmean().item(),
            "loss_ratio": (own.nanmean() / losses[0].nanmean()).item(),
            # Mean and standard error of the differences from the unmerged model, caption by caption.
            "added_loss": (own - losses[0]).nanmean().item(),
            "standard_error": standard_error(own - losses[0]),
        }
        for variant, own in zip(variants, losses, strict=True)
    ]
    return {
        **a.facts(model, device),
        "data": {"name": data_name(a.images), "num_images": len(images), "num_captions": data.num_captions},
        "batch_size": a.batch_size,
        "rows": rows,
        "comparisons": _compare(variants, losses),
    }


def _compare(variants: Sequence[Any], losses: Sequence[torch.Tensor]) -> list[dict[str, Any]]:
    """DTEM's loss minus ToMe's at the same r, caption by caption."""
    by_row = {(v.method, str(v.shown_r)): own for v, own in zip(variants, losses, strict=True)}
    found = []
    for variant, own in zip(variants, losses, strict=True):
        other = by_row.get(("tome", str(variant.shown_r)))
        if variant.method == "dtem" and other is not None:
            difference = own - other
            found.append(
                {
                    "r": variant.shown_r,
                    "dtem_minus_tome": difference.nanmean().item(),
                    "standard_error": standard_error(difference),
                }
            )
    return found


def standard_error(values: torch.Tensor) -> float:
    """Standard error of the mean, without NaN values."""
    known = values[~values.isnan()]
    return (known.std() / len(known) ** 0.5).item() if len(known) > 1 else 0.0
