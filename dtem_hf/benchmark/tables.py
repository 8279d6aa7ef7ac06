"""A benchmark as tables, for a terminal and for Markdown."""

from __future__ import annotations

from typing import Any

from ..report.tables import as_markdown, print_rows, shown, shown_r


def print_benchmark(result: dict[str, Any]) -> None:
    """Show a benchmark in the terminal: a line per row, speed, speed-up and memory under every batch size."""
    title = f"{result['model']['name']} on {result['hardware']}, {result['dtype']}: images/s (quartiles), speed-up"
    columns, lines = _cells(result)
    print_rows(title, columns, _broken_at_commas(lines, 5), names=2)
    for columns, lines in _breakdowns(result):
        print_rows("where the time goes", columns, _broken_at_commas(lines, 3))


def _broken_at_commas(lines: list[list[str]], first: int) -> list[list[str]]:
    """Cells from column `first` on with a figure per line, so that a narrow terminal parts no figure from its unit."""
    return [[*line[:first], *(cell.replace(", ", "\n") for cell in line[first:])] for line in lines]


def markdown(result: dict[str, Any]) -> str:
    """A benchmark as a page: how it was measured, the table, and where the time goes if that was asked."""
    kind = f", captions of {result['caption_tokens']} tokens" if result.get("task") == "captioning" else ""
    size = "×".join(map(str, result["image_size"]))
    parts = [
        f"# {result['model']['name']}: what merging saves",
        f"{result['hardware']}, {result['dtype']}, {size} pixels{kind}; medians of {result['rounds']} interleaved "
        "rounds, quartiles in brackets. A speed-up is the median of the ratios within rounds to the unmerged model in "
        "the same runtime (peers: in eager); of the ideal, to what the multiply-adds alone would give.",
        f"`{result['command']}`",
        as_markdown(*_cells(result), "---"),
    ]
    for columns, lines in _breakdowns(result):
        parts += ["Where the time goes:", as_markdown(columns, lines, "---")]
    if any(line["runtime"] != "eager" for line in result["rows"]) or len(result["rows"]) > 1:
        parts.append("![Speed-up by batch size](speedup.png)")
    return "\n\n".join(parts) + "\n"


def _cells(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    sizes = [batch["batch_size"] for batch in result["rows"][0]["batches"]]
    columns = ["runtime", "method", "r", "M mult-adds", "ideal", *(f"batch {size}" for size in sizes), "break-even"]
    lines = []
    for row in result["rows"]:
        line = [row["runtime"], row["method"], shown_r(row["r"])]
        line.append("–" if row["multiply_adds"] is None else f"{row['multiply_adds'] / 1e6:.1f}")
        line.append(shown(row["ideal_speedup"], ".2f", "×"))
        line += [_batch_cell(batch) for batch in row["batches"]]
        lines.append([*line, str(row["break_even_batch_size"] or "–")])
    return columns, lines


def _batch_cell(batch: dict[str, Any]) -> str:
    speed, memory = batch["images_per_second"], batch["peak_memory"]
    shown = f"{speed['median']:.1f} ({speed['q25']:.1f}–{speed['q75']:.1f}), {batch['speedup']['median']:.2f}×"
    if batch["of_ideal"] is not None:
        shown += f", {batch['of_ideal']:.2f} of ideal"
    return shown if memory is None else f"{shown}, {memory / 2**20:.0f} MiB"


def _breakdowns(result: dict[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    """Milliseconds and shares by part, of eager rows; and of compiled ones, what merging takes."""
    eager, compiled = [], []
    for row in result["rows"]:
        for batch in row["batches"]:
            start = [row["method"], shown_r(row["r"]), str(batch["batch_size"])]
            if batch.get("breakdown"):
                seconds, shares = batch["breakdown"]["seconds"], batch["breakdown"]["shares"]
                parts = [f"{1e3 * seconds[part]:.2f} ms, {100 * shares[part]:.1f} %" for part in seconds]
                eager.append((list(seconds), [*start, *parts]))
            if batch.get("merging"):
                merging = batch["merging"]
                compiled.append([*start, f"{1e3 * merging['seconds']:.2f} ms, {100 * merging['share']:.1f} %"])
    tables = []
    if eager:
        tables.append((["method", "r", "batch", *eager[0][0]], [line for _, line in eager]))
    if compiled:
        tables.append((["method", "r", "batch", "matching and merging, compiled"], compiled))
    return tables
