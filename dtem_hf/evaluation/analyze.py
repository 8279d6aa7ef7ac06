"""Analyse an adapter: compare its token similarities with those of attention keys, and draw which patches it merges.

python recipes/analyze.py --model facebook/deit-small-patch16-224 --data path/to/images --adapter me/dtem-deit-small
python recipes/analyze.py --model ... --data ... --adapter ... --limit 16    # a laptop's CPU
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from ..configuration import MergeConfig
from ..data.folders import NO_LABELS
from ..data.images import ProcessedImages, collate, load_images
from ..files import write_json
from ..hub.adapter import MergeAdapter
from ..labels import method_name
from ..models.attach import attach
from ..models.auto import AutoModelForImageClassification
from ..models.copies import share_weights
from ..opening import load_processor
from ..programs.arguments import ImageArguments, at_least, option, parse_arguments, parse_reduction, read_config
from ..programs.conditions import conditions, data_name, describe_model
from ..programs.lock import only_run_in
from ..progress import tqdm
from ..report.page import read_section, write_report
from ..report.pictures import draw_merged_layers, draw_merged_tokens
from ..report.plots import plot_correlation
from .correlation import correlation_table, similarity_correlations


@dataclass(kw_only=True)
class AnalyzeArguments(ImageArguments):
    """Kendall correlation of similarities before and after training, pictures of merged tokens, a page with both."""

    adapter: str = option("trained adapter: Hub id or local folder")
    limit: int = option("images for the correlation", default=64)
    methods: list[str] = option("methods to draw beside the adapter's", default_factory=lambda: ["tome"])
    r: str = option("tokens merged per layer in the pictures", default="16")
    pictures: int = option("images to draw", default=4)
    batch_size: int = option("images per batch", default=16)
    output_dir: str = option("folder for correlation.json, the pictures and index.html", default="runs/analysis")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "pictures")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, analyse, and write all results into one folder."""
    arguments = parse_arguments(AnalyzeArguments, argv, __doc__ or "")
    with only_run_in(arguments.output_dir) as output:
        record = analyze(arguments)
        write_json(output / "correlation.json", record)
        plot_correlation(record["layers"], output / "correlation.png", title=record["model"]["name"])
        write_report(output / "index.html", f"{record['model']['name']}: what merging does", [read_section(output)])
        for row in record["rows"]:
            print(f"blocks {row['blocks']}: τ {row['before']:.3f} before training, {row['after']:.3f} after")
        print(f"written: correlation.json, pictures and index.html in {output}")


def analyze(arguments: AnalyzeArguments) -> dict[str, Any]:
    """Draw the pictures, and return the content of `correlation.json`."""
    device = arguments.choose_device()
    read_config(arguments.model)  # raises early if the model does not exist
    model = AutoModelForImageClassification.from_pretrained(arguments.model, merge=None).to(device)
    adapter = MergeAdapter.from_reference(arguments.adapter)
    images = load_images(arguments.data, arguments.split, max(arguments.limit, arguments.pictures), NO_LABELS)
    processor = load_processor(arguments.model)
    # The embedding at the start of training, and at its end.
    models = {
        "before": attach(share_weights(model), adapter.config),
        "after": attach(share_weights(model), adapter),
    }
    _draw(arguments, model, models["after"], ProcessedImages(images, processor), processor)
    chosen = images.select(range(min(arguments.limit, len(images))))
    correlations = _correlate(models, ProcessedImages(chosen, processor), arguments.batch_size)
    return {
        **conditions(device),
        "model": describe_model(arguments.model, model),
        "adapter": arguments.adapter,
        "init": getattr(adapter.config, "init", None),
        "data": {"name": data_name(arguments.data), "num_images": len(chosen)},
        "rows": correlation_table(correlations),
        "layers": {name: values.mean(axis=1).tolist() for name, values in correlations.items()},
    }


def _correlate(models: dict[str, Any], images: ProcessedImages, batch_size: int) -> dict[str, NDArray[np.float64]]:
    found: dict[str, list[NDArray[np.float64]]] = {name: [] for name in models}
    for batch in tqdm(DataLoader(images, batch_size, collate_fn=collate), desc="correlate", unit="batch"):
        for name, model in models.items():
            found[name].append(similarity_correlations(model, batch["pixel_values"]))
    return {name: np.concatenate(parts, axis=1) for name, parts in found.items()}


@torch.no_grad()
def _draw(arguments: AnalyzeArguments, plain: Any, learned: Any, images: Any, processor: Any) -> None:
    r = parse_reduction(arguments.r)
    shown = {}
    for method in arguments.methods:
        shown[method_name(method)] = attach(share_weights(plain), MergeConfig.from_dict({"method": method}))
    shown[f"{method_name(learned.merge_config.method)}, learned"] = share_weights(learned)
    for model in shown.values():
        model.set_reduction(r)
    pictures = [images.open(i) for i in range(min(arguments.pictures, len(images)))]
    output = Path(arguments.output_dir)
    draw_merged_tokens(pictures, shown, processor, output / "merged_by_method.png")
    draw_merged_layers(pictures[0], shown, processor, output / "merged_by_layer.png")
