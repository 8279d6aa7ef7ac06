"""Tables of a benchmark and of an advice, for a terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..report.tables import SPEEDUP_LEGEND, TextTable, as_markdown, print_rows, shown, shown_r, table_of
from .verdict import is_same


# Figures that compare a merged model with the unmerged one: two for classifiers, the last for other models.
_ADVICE_MEASURES = (("agreement", ".1f"), ("kl", ".4f"), ("cosine", ".4f"))


def print_benchmark(result: dict[str, Any]) -> None:
    """Show a benchmark in the terminal: a line per row, with speed, speed-up and memory for every batch size."""
    measured = "answers" if result["task"] == "answering" else "images"
    title = f"{result['model']['name']} on {result['hardware']}, {result['dtype']}: {measured}/s (quartiles), speed-up"
    columns, lines = table_of(result["rows"])
    print_rows(title, columns, _broken_at_commas(lines, 5), names=2, legend=SPEEDUP_LEGEND)
    for columns, lines in _breakdowns(result):
        print_rows("where the time goes", columns, _broken_at_commas(lines, 3))


def _broken_at_commas(lines: list[list[str]], first: int) -> list[list[str]]:
    """Put each figure of the cells from column `first` on its own line, so that no figure is split from its unit."""
    return [[*line[:first], *(cell.replace(", ", "\n") for cell in line[first:])] for line in lines]


def markdown(result: dict[str, Any]) -> str:
    """A benchmark as a Markdown page: conditions, the table, and the breakdown if there is one."""
    kind = {
        "captioning": ", captions of {caption_tokens} tokens",
        "answering": ", answers of {answer_tokens} tokens to prompts of {prompt_tokens} tokens and an image (prefill: "
        "until the first token; decoding: the others)",
    }.get(result["task"], "").format_map(result)
    size = "×".join(map(str, result["image_size"]))
    parts = [
        f"# {result['model']['name']}: what merging saves",
        f"{result['hardware']}, {result['dtype']}, {size} pixels{kind}; medians of {result['rounds']} interleaved "
        "rounds, quartiles in brackets. A speed-up is the median of the ratios within rounds to the unmerged model in "
        'the same runtime, or else in eager (peers). "Of ideal": speed-up as a share of the ratio of multiply-adds.',
        f"`{result['command']}`",
        as_markdown(*table_of(result["rows"]), "---"),
    ]
    for columns, lines in _breakdowns(result):
        parts += ["Where the time goes:", as_markdown(columns, lines, "---")]
    if any(line["runtime"] != "eager" for line in result["rows"]) or len(result["rows"]) > 1:
        parts.append("![Speed-up by batch size](speedup.png)")
    return "\n\n".join(parts) + "\n"


def _breakdowns(result: dict[str, Any]) -> list[TextTable]:
    """Milliseconds and shares: of all parts for eager rows, of matching and merging for compiled rows."""
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


def advice_cells(rows: Sequence[dict[str, Any]]) -> TextTable:
    """A line per method and r, with speed and speed-up (over the unmerged model in the same runtime) per runtime."""
    first = [row for row in rows if row["runtime"] == rows[0]["runtime"]]
    measures = [(name, digits) for name, digits in _ADVICE_MEASURES if first[0][name] is not None]
    runtimes = list(dict.fromkeys(row["runtime"] for row in rows))
    sizes = [batch["batch_size"] for batch in rows[0]["batches"]]
    columns = ["method", "r", "share", *(name for name, _ in measures)]
    columns += [f"{runtime}, {size} {'image' if size == 1 else 'images'}" for runtime in runtimes for size in sizes]
    lines = []
    for row in first:
        batches = {other["runtime"]: other["batches"] for other in rows if is_same(other, row)}
        cells = [cell for runtime in runtimes for cell in batches.get(runtime) or [None] * len(sizes)]
        speeds = [
            "–" if cell is None else f"{cell['images_per_second']['median']:.1f} ({cell['speedup']['median']:.2f}×)"
            for cell in cells
        ]
        figures = [shown(row[name], digits) for name, digits in measures]
        lines.append([row["method"], str(row["r"]), f"{row['ratio']:.3f}", *figures, *speeds])
    return columns, lines


def advice_page(result: dict[str, Any]) -> str:
    """An advice as a Markdown page: the sentence, the table, the conditions and the picture."""
    data, load = result["data"], shown(result["load_average"], ".1f")
    left_out = [f"Not measured: {name} ({reason})." for name, reason in result["left_out"].items()]
    conditions = (
        f"{result['hardware']}, load average {load} before the run, {result['dtype']}, {data['num_images']} images of "
        f"{data['name']}, {'×'.join(map(str, result['image_size']))} pixels. share: of the unmerged model's "
        "multiply-adds; agreement in percent of the images, KL in nats. Images per second are medians of "
        f"{result['rounds']} interleaved rounds or fewer; in brackets the median ratio within rounds to the unmerged "
        "model in the same runtime."
    )
    parts = [
        f"# {result['model']['name']}: which r",
        result["sentence"],
        as_markdown(*advice_cells(result["rows"])),
        conditions,
        *left_out,
        *([] if result["finished"] else ["The run was stopped, or still runs: some speeds are missing."]),
        f"`{result['command']}`",
        "![What is kept against speed](advice.png)",
    ]
    return "\n\n".join(parts) + "\n"
