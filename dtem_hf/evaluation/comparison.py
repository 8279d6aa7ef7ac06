"""Compare the accuracy of methods at the same cost.

python recipes/compare.py --model facebook/deit-small-patch16-224 --data imagenet-1k --adapters me/dtem-deit-small
python recipes/compare.py --model ... --data path/to/images --limit 200 --flops 0.65 0.5    # a laptop's CPU
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import write_json, write_text
from ..hub.adapter import MergeAdapter
from ..labels import multiply_adds_unit, reduction_label, series_name
from ..programs.arguments import option, parse_arguments
from ..programs.lock import only_run_in
from ..programs.processes import known_processes
from ..report.plots import measure_of, plot_pareto
from ..report.tables import LEGEND, Columns, as_markdown, interval, number, numbers, print_table, table_of
from ..schedule import FlopsSchedule, as_schedule
from .arguments import METHODS_HELP, SeveralAdapters
from .classification import ClassifierArguments, evaluate
from .variants import METHODS, UNMERGED, Variant, make_variants


# The rows of the ablation; each adds one part to the row above.
ABLATION = {"tome": "ToMe", "soft": "+ soft merging", "dtem": "+ decoupled embedding"}
_ABLATION_TEXT = (
    "What each part adds (in brackets: over the line above). Soft merging is the relaxation of training: no token "
    "leaves, so this line costs as much as the unmerged model. The decoupled embedding is trained by soft merging, "
    "alone, and merges hard."
)


@dataclass(kw_only=True)
class CompareArguments(ClassifierArguments, SeveralAdapters):
    """Compare methods at the same amounts of merging."""

    methods: list[str] = option(
        METHODS_HELP,
        default_factory=lambda: [UNMERGED, *(name for name, method in METHODS.items() if method.by_default)],
    )
    r: list[str] = option("tokens merged per layer, one row each", default_factory=list)
    flops: list[float] = option(
        "shares of the multiply-adds to reach, one row each", default_factory=lambda: [0.8, 0.65, 0.5, 0.4]
    )
    ablation: bool = option("compare ToMe, soft merging by keys, and DTEM instead", default=False)
    output_dir: str = option("folder for comparison.json, .md, .csv and pareto.png", default="runs/compare")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ablation:
            self.methods = [UNMERGED, *ABLATION]

    def make_variants(self, model: Any, adapters: dict[str, MergeAdapter], **options: Any) -> list[Variant]:
        """The rows, with the methods that need an adapter if one is given."""
        given = [] if self.ablation else [a.config.method for a in adapters.values() if a.config.needs_adapter]
        methods = list(dict.fromkeys([*self.methods, *given]))
        return make_variants(model, methods, self.reductions(), self.flops, adapters, **options)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, compare, print the tables, write them as Markdown, CSV and JSON, and plot them."""
    arguments = parse_arguments(CompareArguments, argv, __doc__ or "")

    with only_run_in(arguments.output_dir) as output:

        def keep(result: dict[str, Any]) -> None:
            result["adapters"] = arguments.adapter_references()
            write_comparison(result, output)

        result = evaluate(arguments, keep)
        if known_processes().is_main_process:
            print_table(result)
            print(wide_table(result["rows"]))
            print(f"written: comparison.json, comparison.md, comparison.csv and pareto.png in {arguments.output_dir}")


def write_comparison(result: dict[str, Any], folder: Path) -> None:
    """Write a comparison into a folder: JSON, Markdown, CSV and a plot."""
    write_json(folder / "comparison.json", result)
    write_text(folder / "comparison.md", markdown(result))
    write_text(folder / "comparison.csv", csv_table(result["rows"]))
    plot_pareto(result["rows"], folder / "pareto.png", title=result["model"]["name"])


def markdown(result: dict[str, Any]) -> str:
    """All tables of a comparison, and its conditions, as Markdown."""
    data, rows = result["data"], result["rows"]
    size = "×".join(str(extent) for extent in result["image_size"])
    parts = [
        f"# {result['model']['name']}: methods compared",
        f"{data['num_images']:,} images of {data['name']}, {size} pixels; {result['hardware']}, batch size "
        f"{result['batch_size']}, {result['dtype']}. {_measure_text(rows)}",
        wide_table(rows),
        f"Below, {LEGEND}.",
        long_table(rows),
    ]
    if {row["method"] for row in rows} >= set(ABLATION):
        parts += [_ABLATION_TEXT, ablation_table(rows)]
    parts.append(f"Made by `{result['command']}`.")
    return "\n\n".join(parts) + "\n"


def wide_table(rows: Sequence[dict[str, Any]]) -> str:
    """A line per method, a column per amount of merging, as Markdown."""
    measure = measure_of(rows)
    amounts = list(dict.fromkeys(amount_name(row["r"]) for row in rows if row["method"] != UNMERGED))
    plain = rows[0]
    lines = [["Method", "unmerged", *amounts]]
    for name in dict.fromkeys(series_name(row) for row in rows[1:]):
        mine = {amount_name(row["r"]): row for row in rows[1:] if series_name(row) == name}
        cells = [
            _with_change(mine[amount][measure], plain[measure], mine[amount].get("change_interval"))
            if amount in mine
            else "–"
            for amount in amounts
        ]
        lines.append([name, f"{plain[measure]:.2f}", *cells])
    return as_markdown(lines[0], lines[1:])


def long_table(rows: Sequence[dict[str, Any]]) -> str:
    """A line per row with cost, speed and accuracy, as Markdown."""
    factor, unit = multiply_adds_unit(max(row["multiply_adds"] for row in rows))
    columns: Columns = {
        "Method": series_name,
        "Reduction": lambda row: amount_name(row["r"]),
        "Multiply-adds": number("multiply_adds", ".3f", factor, f" {unit}"),
        "Share": number("ratio", ".3f"),
        "Images/s": number("images_per_second", ".1f"),
        "Speed-up": number("speedup", ".2f", unit="×"),
        "Ideal": lambda row: f"{1 / row['ratio']:.2f}×",
        **numbers(".2f", {"Top-1": "top1", "Top-5": "top5", "ECE": "calibration_error", "Agreement": "agreement"}),
        "KL": number("kl", ".4f"),
    }
    if "kl_interval" in rows[-1]:
        columns["KL, 95 %"] = interval("kl_interval", ".4f")
    return as_markdown(*table_of(rows, columns))


def ablation_table(rows: Sequence[dict[str, Any]]) -> str:
    """ToMe, then what soft merging and the decoupled embedding add to the line above, as Markdown."""
    measure = measure_of(rows)
    amounts = list(dict.fromkeys(amount_name(row["r"]) for row in rows if row["method"] in ABLATION))
    lines, above = [["", *amounts]], dict[str, float]()
    for method, label in ABLATION.items():
        # With several adapters, the first one's row.
        mine = {amount_name(row["r"]): row[measure] for row in reversed(rows) if row["method"] == method}
        cells = [
            _with_change(mine[amount], above[amount]) if amount in above else f"{mine[amount]:.2f}"
            for amount in amounts
        ]
        lines.append([label, *cells])
        above = mine
    return as_markdown(lines[0], lines[1:])


def csv_table(rows: Sequence[dict[str, Any]]) -> str:
    """All figures of all rows, one column each."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({**row, "r": "" if row["r"] is None else amount_name(row["r"])})
    return file.getvalue()


def amount_name(r: Any) -> str:
    """An amount of merging for a table's head: "−35 %" for a share of 0.65, else the schedule's label."""
    schedule = None if r is None else as_schedule(r)
    if isinstance(schedule, FlopsSchedule) and schedule.slope == 0:
        return f"−{100 * (1 - schedule.flops):.4g} %"
    return reduction_label(r)


def _measure_text(rows: Sequence[dict[str, Any]]) -> str:
    if measure_of(rows) == "top1":
        text = "Top-1 accuracy in percent; in brackets, the change from the unmerged model"
    else:
        text = "No labels: agreement with the unmerged model in percent"
    if "change_interval" in rows[-1]:
        text += "; behind the semicolon, the 95 % interval of the change, by a paired bootstrap over the images"
    return f"{text}."


def _with_change(value: float, before: float, interval: Sequence[float] | None = None) -> str:
    """A value, its change, and the interval of the change if it is known."""
    bounds = "" if interval is None else f"; {interval[0]:+.1f} to {interval[1]:+.1f}"
    return f"{value:.2f} ({value - before:+.2f}{bounds})".replace("-", "−")
