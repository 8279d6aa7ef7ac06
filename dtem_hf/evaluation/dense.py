"""Compare a dense head's maps from merged tokens with its maps from unmerged tokens.

python recipes/evaluate_dense.py --model facebook/dinov2-small --head my_heads:depth --data path/to/images --adapter A
python recipes/evaluate_dense.py --model ... --head ... --data ... --methods tome --r 8 16 --limit 50  # a laptop's CPU

The head is your function or module; the program runs no other code from outside. It gets the model's last hidden state
with every patch in place, [B, D, rows, columns] in float32, and returns one map per image, [B, H, W] or [B, 1, H, W].
Maps from 0 to 1, such as probabilities, suit the threshold and the picture. Labels are not read.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..configuration import KeepRateConfig
from ..data.folders import NO_LABELS
from ..data.images import ProcessedImages, collate, load_images
from ..errors import BadValue, check_number
from ..files import write_json, write_text
from ..hub.folder_card import refreshed_card
from ..labels import reduction_label, series_name
from ..models.attach import attach
from ..models.auto import load_encoder
from ..models.copies import share_weights
from ..models.dense_head import DenseHead
from ..models.distances import map_error
from ..models.install import merging_of
from ..opening import load_processor
from ..programs.arguments import ImageArguments, at_least, option, parse_arguments, read_config
from ..programs.conditions import data_name
from ..programs.functions import load_function
from ..programs.lock import only_run_in, output_folder
from ..progress import tqdm
from ..report.pictures import displayed_pixels, draw_maps
from ..report.tables import MAP_LEGEND, as_markdown, print_table, table_of
from ..schedule import FlopsSchedule
from .arguments import METHODS_HELP, SeveralAdapters
from .metrics import bootstrap_interval
from .variants import METHODS, Variant, make_variants


@dataclass(kw_only=True)
class DenseArguments(SeveralAdapters, ImageArguments):
    """Compare a dense head's maps from merged tokens with its maps from unmerged tokens."""

    head: str = option("module:function that makes maps [B, H, W] from patches [B, D, rows, columns]")
    methods: list[str] = option(METHODS_HELP, default_factory=lambda: ["tome", "evit", "dtem"])
    r: list[str] = option(
        "tokens merged per layer, one row each; methods with a keep rate get ToMe's multiply-adds at this r",
        default_factory=lambda: ["4", "8", "12", "16", "20"],
    )
    threshold: float = option("pixels of a map above this value count for IoU", default=0.5)
    num_workers: int = option("processes that decode images", default=1)
    pictures: int = option("number of images in the picture; 0: no picture", default=4)
    picture_data: str | None = option("images for the picture, as in data; left out, the first of data", default=None)
    picture_r: str | None = option("the value of r that the picture shows; left out, the last", default=None)
    output_dir: str = option("folder for dense.json, dense.md and maps.jpg", default="runs/dense")
    write_card: bool = option("write results and a new card into the adapter's folder", default=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "num_workers", "pictures")
        check_number("threshold", self.threshold, -1e38, 1e38)
        if self.picture_r is not None and self.picture_r not in self.r:
            raise BadValue("picture_r", self.picture_r, f"one of {', '.join(self.r)}")
        if self.write_card and (self.adapter is None or not os.path.isdir(self.adapter)):
            raise BadValue("write_card", self.write_card, f"an adapter that is a local folder, not {self.adapter!r}")

    def make_variants(self, model: Any, adapters: dict[str, Any], **options: Any) -> list[Variant]:
        """The rows; at every r, a method with a keep rate gets the multiply-adds of ToMe."""
        unmerged, *matched = make_variants(model, ["tome"], self.reductions(), self.flops, **options)
        rows = [unmerged]
        for name in self.methods:
            reductions, shares = self.reductions(), self.flops
            if name in METHODS and isinstance(METHODS[name].config, KeepRateConfig):
                merged = attach(share_weights(model), METHODS[name].config)
                cost, tokens = merging_of(merged).cost, unmerged.plan.num_tokens
                wanted = [FlopsSchedule(variant.plan.ratio) for variant in matched]
                reductions = [merged.merge_config.with_reduction(each, cost, tokens).schedule for each in wanted]
                shares = []
            rows += make_variants(model, [name], reductions, shares, adapters, **options)[1:]
        return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print the table, and write JSON, Markdown and the picture."""
    arguments = parse_arguments(DenseArguments, argv, __doc__ or "")
    with only_run_in(arguments.output_dir) as folder:
        card = output_folder(str(arguments.adapter)) if arguments.write_card else None
        result = evaluate_dense(arguments, folder / "maps.jpg")
        write_json(folder / "dense.json", result)
        write_text(folder / "dense.md", markdown(result))
        if card is not None:
            with refreshed_card(card):
                write_json(card / "evaluation.json", result)
                if arguments.pictures:
                    shutil.copyfile(folder / "maps.jpg", card / "maps.jpg")
        print_table(result)
        print(f"written: dense.json, dense.md{' and maps.jpg' if arguments.pictures else ''} in {folder}")


@torch.inference_mode()
def evaluate_dense(arguments: DenseArguments, picture: Path | None = None) -> dict[str, Any]:
    """Measure every row on every image, draw some maps, and return the content of `dense.json`."""
    a, device = arguments, arguments.choose_device()
    read_config(a.model)  # raises early if the model does not exist
    head = DenseHead(load_function("head", a.head), a.head)
    model = load_encoder(a.model, "grid").to(device).eval()
    processor = load_processor(a.model)
    images = ProcessedImages(load_images(a.data, a.split, a.limit, NO_LABELS), processor)
    size = tuple(images[0]["pixel_values"].shape[-2:])
    variants = a.make_variants(model, a.load_adapters(), unmerge=True, image_size=size)

    def maps_of(variant: Variant, pixels: Tensor) -> Tensor:
        with variant.ready() as merged:
            return head.maps_of(merged, pixels)

    figures: list[list[Tensor]] = [[] for _ in variants]
    loader = DataLoader(images, a.batch_size, collate_fn=collate, num_workers=a.num_workers)
    for batch in tqdm(loader, desc="maps", unit="batch"):
        pixels = batch["pixel_values"].to(device)
        reference = maps_of(variants[0], pixels)
        for figure, variant in zip(figures, variants, strict=True):
            maps = reference if variant is variants[0] else maps_of(variant, pixels)
            figure.append(torch.stack([map_error(maps, reference), map_iou(maps, reference, a.threshold)]).cpu())
    rows = []
    for variant, parts in zip(variants, figures, strict=True):
        errors, overlaps = torch.cat(parts, dim=1).double().numpy()
        rows.append(
            {
                **variant.facts(),
                "map_error": float(errors.mean()),
                "map_error_interval": bootstrap_interval(errors),
                "iou": float(overlaps.mean()),
                "iou_interval": bootstrap_interval(overlaps),
                **variant.costs(),
            }
        )
    if picture is not None and a.pictures:
        drawn = images
        if a.picture_data is not None:
            drawn = ProcessedImages(load_images(a.picture_data, a.split, None, NO_LABELS), processor)
        first = torch.stack([drawn[i]["pixel_values"] for i in range(min(a.pictures, len(drawn)))]).to(device)
        shown = {_column(rows[i]): maps_of(variants[i], first).cpu().numpy() for i in _shown_rows(a, rows)}
        draw_maps([displayed_pixels(each, processor) for each in first], shown, picture)
    return {
        **a.facts(model, device),
        "task": "image-feature-extraction",
        "adapters": a.adapter_references(),
        "head": a.head,
        "threshold": a.threshold,
        "data": {"name": data_name(a.data), "num_images": len(images)},
        "image_size": list(size),
        "batch_size": a.batch_size,
        "dtype": "float32",
        "rows": rows,
    }


def map_iou(maps: Tensor, reference: Tensor, threshold: float) -> Tensor:
    """Intersection over union of the pixels above a threshold: [B, H, W] twice -> [B]; 1 if neither map has any."""
    own, other = maps > threshold, reference > threshold
    both, either = (own & other).sum(dim=(1, 2)), (own | other).sum(dim=(1, 2))
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


def markdown(result: dict[str, Any]) -> str:
    """The table of a result, and its conditions, as Markdown."""
    size = "×".join(str(extent) for extent in result["image_size"])
    data = result["data"]
    parts = [
        f"# {result['model']['name']}: maps from merged tokens",
        f"{data['num_images']:,} images of {data['name']}, {size} pixels, head `{result['head']}`, threshold "
        f"{result['threshold']:g}. Below, {MAP_LEGEND}.",
        as_markdown(*table_of(result["rows"])),
        f"Made by `{result['command']}`.",
    ]
    return "\n\n".join(parts) + "\n"


def _shown_rows(arguments: DenseArguments, rows: Sequence[dict[str, Any]]) -> list[int]:
    """The indices of the rows that the picture shows: the unmerged model, and every method at one r."""
    wanted = -1 if arguments.picture_r is None else arguments.r.index(arguments.picture_r)
    series: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        series.setdefault(series_name(row), []).append(i)
    return [places[min(wanted, len(places) - 1)] for places in series.values()]


def _column(row: dict[str, Any]) -> str:
    return series_name(row) if row["r"] is None else f"{series_name(row)}, {reduction_label(row['r'])}"
