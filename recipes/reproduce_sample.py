"""Train the adapter of model_cards/deit-tiny-sample again, write its card, and compare it with the published one.

make reproduce-sample                              # ASSETS=folder with deit_tiny, images/train and images/dev
make reproduce-sample STEPS=2 LIMIT=16             # only to see that it runs
python recipes/reproduce_sample.py --model M --train IMAGES --dev LABELLED_IMAGES

Two trainings run one after the other, by recipes/configs/deit_tiny_sample.yaml and deit_tiny_sample_aggregation.yaml.
Then ToMe, the published adapter and the new one are measured in one pass over the same images. The new adapter, its
card and reproduction.json are in output_dir. After a stop, the same command goes on where the run stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtem_hf.errors import BadValue
from dtem_hf.evaluation.classification import evaluate
from dtem_hf.evaluation.comparison import CompareArguments
from dtem_hf.files import write_json
from dtem_hf.hub.folder_card import write_card
from dtem_hf.hub.layout import EVALUATION_NAME
from dtem_hf.programs.arguments import at_least, option, parse_arguments, run_script
from dtem_hf.programs.lock import only_run_in
from dtem_hf.report.plots import plot_accuracy
from dtem_hf.report.tables import about, print_rows, shown
from dtem_hf.training.arguments import TrainArguments
from dtem_hf.training.program import train


RECIPES = Path(__file__).resolve().parent
STAGES = ("deit_tiny_sample", "deit_tiny_sample_aggregation")
FIGURES = ("top1", "kl", "change_interval", "kl_interval", "agreement")


@dataclass(kw_only=True)
class ReproduceArguments:
    """Train, measure and write the card of the sample adapter again."""

    model: str = option("DeiT-tiny: Hub id or local folder", default="../shared/assets/deit_tiny")
    train: str = option("images to learn from", default="../shared/assets/images/train")
    dev: str = option("labelled images to measure on", default="../shared/assets/images/dev")
    published: str = option("adapter to compare with: local folder", default="model_cards/deit-tiny-sample")
    output_dir: str = option("folder for the runs, the adapter and reproduction.json", default="runs/reproduce-sample")
    steps: int | None = option("steps of each training; left out: those of the recipes", default=None)
    limit: int | None = option("images to validate and to measure on; left out: those of the recipes", default=None)

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "limit")
        if not Path(self.published).is_dir():
            raise BadValue("published", self.published, "the folder of an adapter")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, train, measure, write the card, and print both adapters' figures side by side."""
    arguments = parse_arguments(ReproduceArguments, argv, __doc__ or "")
    with only_run_in(arguments.output_dir) as output:
        records, start = {}, list[str]()
        for name in STAGES:
            print(f"== {name}", flush=True)
            records[name] = train(_training(arguments, name, start))
            start = ["--start_from", str(output / name / "adapter")]
        print("== the published adapter and the new one", flush=True)
        measure(arguments, output / STAGES[-1] / "adapter", records)


def _training(arguments: ReproduceArguments, name: str, start: Sequence[str]) -> TrainArguments:
    """The options of one training: the recipe's, with these images and a folder for this training."""
    words = ["--config", str(RECIPES / "configs" / f"{name}.yaml"), "--output_dir", f"{arguments.output_dir}/{name}"]
    words += ["--model", arguments.model, "--data", arguments.train, *start]
    words += [] if arguments.steps is None else ["--steps", str(arguments.steps)]
    words += [] if arguments.limit is None else ["--validation_size", str(arguments.limit)]
    return parse_arguments(TrainArguments, words, "")


def measure(arguments: ReproduceArguments, adapter: Path, records: dict[str, Any]) -> None:
    """Measure both adapters; write the new one's evaluation and card, and reproduction.json.

    `records` holds the record of each training.
    """
    sides = {"published": arguments.published, "rebuilt": str(adapter)}
    comparison = CompareArguments(
        model=arguments.model,
        data=arguments.dev,
        limit=arguments.limit,
        methods=["none", "tome", "dtem"],
        r=["8", "13", "16", "20"],
        flops=[],
        adapters=list(sides.values()),
        output_dir=f"{arguments.output_dir}/evaluation",
    )

    def keep(result: dict[str, Any]) -> None:
        own = [row for row in result["rows"] if row.get("adapter", sides["rebuilt"]) == sides["rebuilt"]]
        own = [{name: value for name, value in row.items() if name != "adapter"} for row in own]
        write_json(adapter / EVALUATION_NAME, {**result, "adapter": sides["rebuilt"], "rows": own})
        plot_accuracy(own, adapter / "accuracy.png", title=result["model"]["name"])
        write_card(adapter)
        rows = side_by_side(result["rows"], sides)
        facts = {name: value for name, value in result.items() if name not in ("rows", "adapter")}
        seconds = {name: record["seconds"] for name, record in records.items()}
        written = {**facts, "adapters": sides, "training_seconds": seconds, "rows": rows}
        write_json(Path(arguments.output_dir) / "reproduction.json", written)
        lines = [
            [str(row["r"]), *(shown(row[side][name], form) for name, form in shapes for side in ("tome", *sides))]
            for row in rows
        ]
        columns = [f"{title} {side}" for title in ("KL", "top-1") for side in ("ToMe", *sides)]
        print_rows(about(result), ["r", *columns], lines)

    shapes = (("kl", ".4f"), ("top1", ".1f"))
    evaluate(comparison, keep)
    print(f"written: {arguments.output_dir}/reproduction.json; the adapter and its card are in {adapter}")


def side_by_side(rows: Sequence[dict[str, Any]], sides: dict[str, str]) -> list[dict[str, Any]]:
    """For each r, the figures of ToMe and both adapters, and new minus published in KL and top-1."""
    found: dict[Any, dict[str, Any]] = {}
    names = {folder: side for side, folder in sides.items()}
    for row in rows:
        if row["r"] is not None:
            side = names.get(row.get("adapter", ""), row["method"])
            found.setdefault(row["r"], {"r": row["r"]})[side] = {name: row[name] for name in FIGURES}
    for row in found.values():
        for name in ("kl", "top1"):
            before, after = (row[side][name] for side in ("published", "rebuilt"))
            row[f"{name}_difference"] = None if before is None else after - before
    return list(found.values())


if __name__ == "__main__":
    run_script(main)
