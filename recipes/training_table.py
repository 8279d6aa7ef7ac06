"""Train and evaluate one backbone in several ways, one row of a YAML list each, and write a table of the results.

python recipes/training_table.py --rows recipes/configs/training_table.yaml --model path/to/deit_tiny \\
    --train path/to/images --dev path/to/labelled/images --output_dir docs/training

A row whose JSON is in output_dir, with the same options, is finished and not made again. So the same command goes on
where it stopped.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from dtem_hf.configuration import MergeConfig
from dtem_hf.errors import BadValue
from dtem_hf.files import read_json, write_json, write_text
from dtem_hf.programs.arguments import option, parse_arguments, run_script
from dtem_hf.programs.lock import only_run_in
from dtem_hf.report.plots import plot_training
from dtem_hf.report.tables import as_markdown


_RECIPES = Path(__file__).parent


@dataclass(kw_only=True)
class TrainingTableArguments:
    """Train, evaluate, and put into a table."""

    rows: str = option("YAML file of the rows")
    model: str = option("classifier: Hub id or local folder")
    train: str = option("images to learn from: folder, or Hub dataset")
    dev: str = option("labelled images to evaluate on: folder, or Hub dataset")
    work_dir: str = option("folder for the runs themselves", default="runs/training_table")
    output_dir: str = option("folder for one JSON per row, table.md and table.png", default="docs/training")


@dataclass
class Row:
    """One row of the YAML file: trained, calibrated (with `program`), or a method without training (with `method`)."""

    name: str
    title: str
    options: dict[str, Any] = field(default_factory=dict)
    start_from: str | None = None
    program: str | None = None
    method: str | None = None


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, train and evaluate the missing rows, and write the table of all finished ones."""
    arguments = parse_arguments(TrainingTableArguments, argv, __doc__ or "")
    table = _Table(arguments)
    with only_run_in(arguments.output_dir):
        for row in table.rows.values():
            table.make(row)
        print(f"written: {table.write()}")


class _Table:
    def __init__(self, arguments: TrainingTableArguments) -> None:
        self.arguments = arguments
        values = yaml.safe_load(Path(arguments.rows).read_text(encoding="utf-8"))
        self.reductions: list[int] = values["reductions"]
        self.common: dict[str, Any] = values["common"]
        self.rows: dict[str, Row] = {}
        for given in values["rows"]:
            keys = sorted(f.name for f in fields(Row))
            if not set(given) <= set(keys) or "name" not in given:
                raise BadValue("rows", given, f"a name and some of {', '.join(keys)}")
            row = Row(**given)
            if row.start_from is not None and row.start_from not in self.rows:
                raise BadValue(f"start_from of {row.name}", row.start_from, "a row above it")
            self.rows[row.name] = row
        self.output, self.work = Path(arguments.output_dir), Path(arguments.work_dir)

    def make(self, row: Row) -> None:
        """Train and evaluate a row, unless its JSON is there."""
        path = self.output / f"{row.name}.json"
        asked = {"row": vars(row), "common": self.common, "reductions": self.reductions}
        if path.is_file() and read_json(path)["asked"] == json.loads(json.dumps(asked)):
            return
        print(f"== {row.name}: {row.title}", flush=True)
        record: dict[str, Any] = {"asked": asked}
        if row.program == "calibrate":
            record["calibrations"] = [self._calibrate(row, r) for r in self.reductions]
            record["evaluations"] = [
                self._evaluate(row, [json.dumps(found["reductions"])]) for found in record["calibrations"]
            ]
        else:
            if row.method is None:
                record["training"] = self._train(row)
            record["evaluations"] = [self._evaluate(row, [str(r) for r in self.reductions])]
        write_json(path, record)

    def write(self) -> Path:
        """Write the table and the plot of all finished rows."""
        records = [
            (row, read_json(p)) for row in self.rows.values() if (p := self.output / f"{row.name}.json").is_file()
        ]
        baseline = next((_rows(record) for row, record in records if row.name == "tome"), None)
        header = ["trained by"]
        for r in self.reductions:
            header += [f"KL, r = {r}", "of ToMe's", "top-1"]
        lines = []
        for row, record in records:
            cells = [f"[{row.title}]({row.name}.json)"]
            for i, own in enumerate(_rows(record)):
                share = "" if baseline is None else f"{own['kl'] / baseline[i]['kl']:.2f}"
                cells += [f"{own['kl']:.4f}", share, f"{own['top1']:.1f}"]
            lines.append(cells)
        first = records[0][1]["evaluations"][0]
        plain = first["rows"][0]
        head = (
            f"`{first['model']['name']}` on {first['data']['num_images']} images; unmerged, its top-1 is "
            f"{plain['top1']:.1f}. KL is the mean over images of KL(unmerged ‖ merged) in nats. Written by\n"
            "`python recipes/training_table.py --rows recipes/configs/training_table.yaml --model … --train … "
            "--dev …`; every row's JSON holds its commands.\n\n"
        )
        write_text(self.output / "table.md", head + as_markdown(header, lines) + "\n")
        plot_training(
            [(row.title, [r["kl"] for r in _rows(record)]) for row, record in records],
            self.reductions,
            self.output / "table.png",
        )
        return self.output / "table.md"

    def _train(self, row: Row) -> dict[str, Any]:
        start = {} if row.start_from is None else {"start_from": self._adapter(row.start_from)}
        options = {**self.common, **row.options, **start}
        return self._run("train", self.arguments.train, options, self.work / row.name, "adapter/training.json")

    def _calibrate(self, row: Row, r: int) -> dict[str, Any]:
        start = {"method": row.method} if row.start_from is None else {"adapter": self._adapter(row.start_from)}
        options = {**start, "r": r, **row.options}
        return self._run("calibrate", self.arguments.train, options, self.work / row.name / str(r), "calibration.json")

    def _evaluate(self, row: Row, reductions: list[str]) -> dict[str, Any]:
        adapter = {} if row.method is not None else {"adapter": self._adapter(row.name)}
        method = row.method or MergeConfig.from_pretrained(adapter["adapter"]).method
        asked = {"methods": ["none", method], **adapter, "r": reductions, "num_workers": 0}
        return self._run("evaluate", self.arguments.dev, asked, self.work / row.name / "evaluation", "evaluation.json")

    def _adapter(self, name: str) -> Path:
        """A row's adapter. A calibrated row has no adapter, so it uses the one that it started from."""
        row = self.rows[name]
        if row.program == "calibrate" and row.start_from is not None:
            return self._adapter(row.start_from)
        return self.work / name / "adapter"

    def _run(self, recipe: str, data: str, options: dict[str, Any], folder: Path, result: str) -> dict[str, Any]:
        """Run a recipe in another process and read its result. Raises CalledProcessError if it fails."""
        words = []
        for name, value in {"model": self.arguments.model, "data": data, **options, "output_dir": folder}.items():
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        subprocess.run([sys.executable, str(_RECIPES / f"{recipe}.py"), *words], check=True)
        return read_json(folder / result)


def _rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The merged rows of a record, one for each r."""
    return [row for evaluation in record["evaluations"] for row in evaluation["rows"][1:]]


if __name__ == "__main__":
    run_script(main)
