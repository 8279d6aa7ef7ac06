"""Log the figures of a run by step, in `metrics.jsonl` and in Accelerate's trackers."""

from __future__ import annotations

import json
import re
import uuid
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from ..errors import BadValue
from ..files import write_text


METRICS_NAME = "metrics.jsonl"
LOGS_NAME = "logs"


def wanted_trackers(report_to: list[str]) -> list[str]:
    """The trackers in `report_to`. Raises ValueError for one that is unknown or not installed."""
    names = [name for name in report_to if name != "none"]
    installed = [str(name) for name in get_available_trackers()]
    for name in names:
        if name not in installed:
            raise BadValue("report_to", name, f"none, or one of the installed trackers: {', '.join(installed)}")
    return list(dict.fromkeys(names))


def new_run_id(output: Path) -> str:
    """A new id for trackers: the folder's name in letters that all of them accept, and a random part."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", output.absolute().name).strip("-.")[:48] or "run"
    return f"{name}-{uuid.uuid4().hex[:8]}"


class Metrics:
    """Logs figures by step. Timings go only to trackers, so that a repeated run writes the same `metrics.jsonl`."""

    def __init__(self, accelerator: Accelerator, output: Path) -> None:
        self.accelerator, self.output = accelerator, output
        self.path = output / METRICS_NAME
        self.run_id = new_run_id(output)

    def start(self, arguments: dict[str, Any], step: int) -> None:
        """Delete the figures of steps after `step`, the step to resume from (0: all figures), and open the trackers.

        A resumed run must set `run_id` to the original id before.
        """
        if self.accelerator.is_main_process:
            self._delete_after(step)
        if not self.accelerator.log_with:
            return
        self.accelerator.init_trackers(
            "dtem-hf",
            config={key: _plain(value) for key, value in arguments.items()} if step == 0 else None,
            init_kwargs={
                # Steps after the checkpoint are logged again; purge those of the interrupted run.
                "tensorboard": {"purge_step": step + 1} if step else {},
                "trackio": {"name": self.run_id, "resume": "allow", "auto_log_gpu": False},
                "wandb": {"name": self.run_id, "id": self.run_id, "resume": "allow", "dir": str(self.output)},
            },
        )

    def log(self, step: int, figures: dict[str, Any], timing: dict[str, float] | None = None) -> None:
        """Log the figures of a step; in trackers, nested figures get names like `validation/kl`."""
        if self.accelerator.is_main_process:
            self.output.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **figures}) + "\n")
        if self.accelerator.log_with:
            self.accelerator.log({**flat(figures), **flat(timing or {})}, step=step)

    def _delete_after(self, step: int) -> None:
        if step == 0:
            self.path.unlink(missing_ok=True)
        elif self.path.is_file():
            lines = [line for line in self.path.read_text(encoding="utf-8").splitlines() if _step(line) <= step]
            write_text(self.path, "".join(line + "\n" for line in lines))


def flat(figures: dict[str, Any], group: str = "train") -> dict[str, float]:
    """Names for trackers: {"loss": 1.0, "tokens": [17.0, 9.0]} -> {"train/loss": 1.0, "tokens/layer_00": 17.0, …}."""
    named: dict[str, float] = {}
    for name, value in figures.items():
        if isinstance(value, dict):
            named.update(flat(value, name if group == "train" else f"{group}_{name}"))
        elif isinstance(value, list):
            named.update({f"{name}/layer_{i:02d}": item for i, item in enumerate(value)})
        else:
            named[f"{group}/{name}"] = value
    return named


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # the run was killed while it wrote this line


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str)) else str(value)
