"""The rows of an evaluation as a table, for a terminal and for Markdown."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from ..labels import reduction_label


COLUMNS = ("method", "r", "top-1", "top-5", "ECE", "agreement", "KL", "M mult-adds", "share", "images/s", "speed-up")


def cells(row: dict[str, Any]) -> list[str]:
    """One row of `evaluation.json` under COLUMNS, as text."""
    return [
        row["method"],
        _reduction(row["r"]),
        _shown(row["top1"], "{:.1f}"),
        _shown(row["top5"], "{:.1f}"),
        _shown(row.get("calibration_error"), "{:.1f}"),
        f"{row['agreement']:.1f}",
        f"{row['kl']:.4f}",
        f"{row['multiply_adds'] / 1e6:.1f}",
        f"{row['ratio']:.3f}",
        _shown(row["images_per_second"], "{:.0f}"),
        _shown(row["speedup"], "{:.2f}×"),
    ]


def print_table(result: dict[str, Any]) -> None:
    """Show the rows of an evaluation in the terminal."""
    data = result["data"]
    table = Table(title=f"{result['model']['name']} on {data['num_images']} images of {data['name']}")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in result["rows"]:
        table.add_row(*cells(row))
    Console(width=120).print(table)


def markdown_table(result: dict[str, Any]) -> str:
    """The rows of an evaluation as a Markdown table."""
    lines = [COLUMNS, ["---", *["---:"] * (len(COLUMNS) - 1)], *map(cells, result["rows"])]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _reduction(r: Any) -> str:
    if r is None:
        return ""
    return reduction_label(r) if isinstance(r, dict) else json.dumps(r)


def _shown(value: float | None, template: str) -> str:
    return "–" if value is None else template.format(value)
