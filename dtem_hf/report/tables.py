"""Tables of results, for a terminal and for Markdown."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from ..labels import reduction_label, series_name


# Headings, and lines of texts.
TextTable = tuple[list[str], list[list[str]]]

# Explanations of the columns.
LEGEND = (
    "top-1, top-5, ECE (expected calibration error) and agreement (images with the unmerged model's class) in "
    "percent; KL: divergence from the unmerged model's probabilities, in nats; share: of its multiply-adds"
)
_SPEEDUP = "; speed-up: ratio of the images/s"
# For tables with both columns.
SPEEDUP_LEGEND = (
    "images/s: median over the rounds; speed-up: median of the ratios within rounds to the unmerged model in the same "
    "runtime, which other load changes less than the ratio of the two medians"
)
_FEATURE_LEGEND = (
    "cosine: with the unmerged model's features; same nearest: images whose nearest other image stays the same, in "
    "percent; k-NN top-1: images whose label their nearest others vote for, in percent; share: of its multiply-adds"
)
MAP_LEGEND = (
    "error: mean absolute difference of a map from the unmerged model's; IoU: intersection over union of the pixels "
    "above the threshold with the unmerged model's; both are means over images. share: of the unmerged multiply-adds"
)


# Makes the cell of a row; columns are such functions by heading.
Cell = Callable[[dict[str, Any]], str]
Columns = dict[str, Cell]


def number(name: str, form: str, per: float = 1, unit: str = "") -> Cell:
    """Cells with an entry of a row, divided by `per`; a dash without it."""

    def cell(row: dict[str, Any]) -> str:
        value = row.get(name)
        return shown(None if value is None else value / per, form, unit)

    return cell


def numbers(form: str, names: dict[str, str]) -> Columns:
    """Columns of numbers in one format: entries of a row by heading."""
    return {heading: number(name, form) for heading, name in names.items()}


def interval(name: str, form: str) -> Cell:
    """Cells with the two ends of an interval."""
    return lambda row: " to ".join(f"{end:{form}}" for end in row[name])


def _amount(row: dict[str, Any]) -> str:
    return json.dumps(row["r"]) if isinstance(row["r"], (int, list)) else shown_r(row["r"])


_NAMES: Columns = {"method": lambda row: row["method"], "r": _amount}
_COSTS = {"M mult-adds": number("multiply_adds", ".1f", 1e6), "share": number("ratio", ".3f")}
_SPEED = {"images/s": number("images_per_second", ".0f"), "speed-up": number("speedup", ".2f", unit="×")}
_VISUAL = {"visual tokens": number("visual_tokens", ".0f")}
_FEATURES = {
    **_NAMES,
    "cosine": number("cosine", ".4f"),
    "cosine, 95 %": interval("cosine_interval", ".4f"),
    **numbers(".1f", {"same nearest": "same_nearest", "k-NN top-1": "knn_top1"}),
    **_COSTS,
    **_SPEED,
}
_MAPS = {
    "method": series_name,
    "r": lambda row: reduction_label(row["r"]),
    "error": number("map_error", ".4f"),
    "error, 95 %": interval("map_error_interval", ".4f"),
    "IoU": number("iou", ".3f"),
    "IoU, 95 %": interval("iou_interval", ".3f"),
    **_COSTS,
}
_SEGMENTATION = {**_NAMES, **numbers(".1f", {"mIoU": "miou", "pixel accuracy": "pixel_accuracy"}), **_COSTS}
_CAPTIONS = {
    **_NAMES,
    **{name: number(name, ".1f", 0.01) for name in ("BLEU-1", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr", "SPICE")},
    **_VISUAL,
    **{f"M {part}": number(f"{part}_multiply_adds", ".1f", 1e6) for part in ("encoder", "decoding")},
    "captions/s": number("captions_per_second", ".1f"),
}
_LOSSES = {
    **_NAMES,
    **_VISUAL,
    "share": _COSTS["share"],
    **numbers(".4f", {"loss": "loss", "ratio": "loss_ratio"}),
    "added": number("added_loss", "+.4f"),
    "±": number("standard_error", ".4f"),
}
_CLASSES = {
    **_NAMES,
    **numbers(".1f", {"top-1": "top1", "top-5": "top5", "ECE": "calibration_error", "agreement": "agreement"}),
    "KL": number("kl", ".4f"),
    **_COSTS,
    **_SPEED,
}
# The columns of each kind of result, and their legend, by an entry that only rows of this kind have.
_KINDS: dict[str, tuple[Columns, str | None]] = {
    "cosine": (_FEATURES, f"{_FEATURE_LEGEND}{_SPEEDUP}"),
    "map_error": (_MAPS, MAP_LEGEND),
    "miou": (_SEGMENTATION, None),
    "CIDEr": (_CAPTIONS, None),
    "added_loss": (_LOSSES, None),
    "kl": (_CLASSES, f"{LEGEND}{_SPEEDUP}"),
}


def columns_of(rows: Sequence[dict[str, Any]]) -> Columns:
    """The columns of a result; for a kind without columns of its own, all entries under their own names."""
    if "batches" in rows[0]:
        return _benchmark_columns(rows)
    for name, (columns, _) in _KINDS.items():
        if name in rows[0]:
            return columns
    return {name.replace("_", " "): partial(_entry, name) for row in rows for name in row}


def table_of(rows: Sequence[dict[str, Any]], columns: Columns | None = None) -> TextTable:
    """The headings and the lines of a result's table."""
    columns = columns or columns_of(rows)
    return list(columns), [[cell(row) for cell in columns.values()] for row in rows]


def _entry(name: str, row: dict[str, Any]) -> str:
    value = row.get(name)
    return f"{value:.4g}" if isinstance(value, float) else "–" if value is None else str(value)


def print_rows(
    title: str, columns: Sequence[str], lines: Sequence[Sequence[str]], names: int = 1, legend: str | None = None
) -> None:
    """Show a table in the terminal; the first `names` columns are text, the others are numbers.

    If the terminal is too narrow, it shows several tables, each with the first `names` columns, so that no figure is
    split from its unit.
    """
    console = Console()
    widths = [
        max(cell_len(part) for part in f"{column}\n{chr(10).join(cells)}".splitlines())
        for column, *cells in zip(columns, *lines, strict=True)
    ]
    room = console.width if console.is_terminal or "COLUMNS" in os.environ else math.inf
    groups: list[list[int]] = [[]]
    for number in range(names, len(columns)):
        shown = [*range(names), *groups[-1], number]
        if groups[-1] and sum(widths[i] + 3 for i in shown) >= room:
            groups.append([])
        groups[-1].append(number)
    for place, group in enumerate(groups):
        chosen = [*range(names), *group]
        last = place == len(groups) - 1
        table = Table(title=None if place else title, caption=legend if last else None)
        for number in chosen:
            table.add_column(columns[number], justify="left" if number < names else "right", no_wrap=True)
        for line in lines:
            table.add_row(*(line[number] for number in chosen))
        Console(width=max(console.width, sum(widths[i] + 3 for i in chosen) + 1)).print(table)


def as_markdown(columns: Sequence[str], lines: Sequence[Sequence[str]], alignment: str = "---:") -> str:
    """A Markdown table; `alignment` applies to all columns but the first."""
    marks = ["---", *[alignment] * (len(columns) - 1)]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in (columns, marks, *lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def shown(value: float | None, form: str, unit: str = "") -> str:
    """A number as text, or a dash for None."""
    return "–" if value is None else f"{value:{form}}{unit}"


def shown_r(r: Any) -> str:
    """A row's r in a table; empty for the unmerged model."""
    return "" if r is None else reduction_label(r)


def about(result: dict[str, Any]) -> str:
    """The title of a result's table, from its model and data."""
    data = result["data"]
    return f"{result['model']['name']} on {data['num_images']} images of {data['name']}"


def _benchmark_columns(rows: Sequence[dict[str, Any]]) -> Columns:
    sizes = [batch["batch_size"] for batch in rows[0]["batches"]]
    return {
        "runtime": lambda row: row["runtime"],
        "method": lambda row: row["method"] + (f", {row['tokens_read']} tokens" if "tokens_read" in row else ""),
        "r": lambda row: shown_r(row["r"]),
        "M mult-adds": _COSTS["M mult-adds"],
        "ideal": number("ideal_speedup", ".2f", unit="×"),
        **{f"batch {size}": partial(_batch_cell, i) for i, size in enumerate(sizes)},
        "break-even": number("break_even_batch_size", ".0f"),
    }


def _batch_cell(place: int, row: dict[str, Any]) -> str:
    batch = row["batches"][place]
    speed, memory = batch["images_per_second"], batch["peak_memory"]
    digits = 1 if speed["median"] >= 1 else 3  # large language models answer less than one prompt per second
    median, low, high = (f"{speed[name]:.{digits}f}" for name in ("median", "q25", "q75"))
    shown = f"{median} ({low}–{high}), {batch['speedup']['median']:.2f}×"
    if batch["of_ideal"] is not None:
        shown += f", {batch['of_ideal']:.2f} of ideal"
    for part in ("prefill", "decoding"):
        if f"{part}_seconds" in batch:
            shown += f", {part} {1e3 * batch[f'{part}_seconds']['median']:.1f} ms"
    return shown if memory is None else f"{shown}, {memory / 2**20:.0f} MiB"


def print_table(result: dict[str, Any]) -> None:
    """Show the rows of a result in the terminal."""
    legend = next(legend for name, (_, legend) in _KINDS.items() if name in result["rows"][0])
    print_rows(about(result), *table_of(result["rows"]), legend=legend)
