"""Tables of results, for a terminal and for Markdown."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from ..labels import reduction_label, series_name


_COSTS = ("M mult-adds", "share", "images/s", "speed-up")
COLUMNS = ("method", "r", "top-1", "top-5", "ECE", "agreement", "KL", *_COSTS)
FEATURE_COLUMNS = ("method", "r", "cosine", "cosine, 95 %", "same nearest", "k-NN top-1", *_COSTS)
MAP_COLUMNS = ("method", "r", "error", "error, 95 %", "IoU", "IoU, 95 %", *_COSTS[:2])

# Explanations of the columns.
LEGEND = (
    "top-1, top-5, ECE (expected calibration error) and agreement (images with the unmerged model's class) in "
    "percent; KL: divergence from the unmerged model's probabilities, in nats; share: of its multiply-adds"
)
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


def columns_of(rows: Sequence[dict[str, Any]]) -> Sequence[str]:
    """The columns of an evaluation of classes, of features, or of maps."""
    return FEATURE_COLUMNS if "cosine" in rows[0] else MAP_COLUMNS if "map_error" in rows[0] else COLUMNS


def cells(row: dict[str, Any]) -> list[str]:
    """The cells of an evaluation's row, as text."""
    r, name = row["r"], row["method"]
    amount = json.dumps(r) if isinstance(r, (int, list)) else shown_r(r)
    costs = [
        f"{row['multiply_adds'] / 1e6:.1f}",
        f"{row['ratio']:.3f}",
        shown(row.get("images_per_second"), ".0f"),
        shown(row.get("speedup"), ".2f", "×"),
    ]
    if "map_error" in row:
        name, amount, costs = series_name(row), reduction_label(r), costs[:2]
        figures = [f"{row['map_error']:.4f}", "{:.4f} to {:.4f}".format(*row["map_error_interval"])]
        figures += [f"{row['iou']:.3f}", "{:.3f} to {:.3f}".format(*row["iou_interval"])]
    elif "cosine" in row:
        figures = [f"{row['cosine']:.4f}", "{:.4f} to {:.4f}".format(*row["cosine_interval"])]
        figures += [shown(row[key], ".1f") for key in ("same_nearest", "knn_top1")]
    else:
        figures = [shown(row.get(key), ".1f") for key in ("top1", "top5", "calibration_error")]
        figures += [f"{row['agreement']:.1f}", f"{row['kl']:.4f}"]
    return [name, amount, *figures, *costs]


def benchmark_cells(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The columns and the cells of a benchmark's rows, as text."""
    sizes = [batch["batch_size"] for batch in rows[0]["batches"]]
    columns = ["runtime", "method", "r", "M mult-adds", "ideal", *(f"batch {size}" for size in sizes), "break-even"]
    lines = []
    for row in rows:
        read = f", {row['tokens_read']} tokens" if "tokens_read" in row else ""
        line = [row["runtime"], row["method"] + read, shown_r(row["r"])]
        line.append("–" if row["multiply_adds"] is None else f"{row['multiply_adds'] / 1e6:.1f}")
        line.append(shown(row["ideal_speedup"], ".2f", "×"))
        line += [_batch_cell(batch) for batch in row["batches"]]
        lines.append([*line, str(row["break_even_batch_size"] or "–")])
    return columns, lines


def _batch_cell(batch: dict[str, Any]) -> str:
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
    """Show the rows of an evaluation in the terminal."""
    columns = columns_of(result["rows"])
    legend = {COLUMNS: LEGEND, FEATURE_COLUMNS: _FEATURE_LEGEND, MAP_COLUMNS: MAP_LEGEND}[tuple(columns)]
    if "speed-up" in columns:
        legend += "; speed-up: ratio of the images/s"
    print_rows(about(result), columns, [cells(row) for row in result["rows"]], legend=legend)
