"""The results of a run: the best adapter, the trained model, and the record of training."""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator, DistributedType

from ..files import replacing_folder, write_json
from ..hub.folder_card import refreshed_card
from ..hub.layout import TRAINING_NAME
from ..hub.records import read_record
from ..programs.conditions import command, data_name, hardware, versions
from .arguments import TrainArguments
from .tasks import Task


class Results:
    """A run's folders `adapter` and, if the backbone learns, `model`. All processes must call every method."""

    def __init__(self, arguments: TrainArguments, accelerator: Accelerator, task: Task) -> None:
        self.arguments, self.accelerator, self.task = arguments, accelerator, task
        self.adapter, self.model = Path(arguments.output_dir, "adapter"), Path(arguments.output_dir, "model")
        self._copy: Any = None

    def prepare(self, model: Any) -> None:
        """Copy a model before `Accelerator.prepare` shards it; `save` loads the gathered weights into the copy."""
        plugin = self.accelerator.state.deepspeed_plugin
        zero_3 = plugin is not None and plugin.zero_stage == 3
        if zero_3 or self.accelerator.distributed_type == DistributedType.FSDP:
            self._copy = copy.deepcopy(model) if self.accelerator.is_main_process else model

    def save(self, wrapped: Any, model: Any, record: dict[str, Any]) -> None:
        """Write the learned weights; `wrapped` is the prepared model, and `model` the merged model inside it."""
        if self._copy is not None:
            weights = self.accelerator.get_state_dict(wrapped)
            if self.accelerator.is_main_process:
                self._copy.load_state_dict(weights)
            model = self._copy
        if not self.accelerator.is_main_process:
            return
        if self.arguments.train_backbone:
            with replacing_folder(self.model) as folder:
                self.task.save_model(model, folder)
        write_json(self.adapter / TRAINING_NAME, record)
        model.save_merge_adapter(self.adapter, base_model=self.arguments.base_model)

    def write_record(self, record: dict[str, Any]) -> dict[str, Any]:
        """Write `training.json` and the card, unless the file is of this step already; returns its content."""
        path = self.adapter / TRAINING_NAME
        # A finished run that is started again has trained nothing with its options: the record stays.
        kept = read_record(path) if path.is_file() else {}
        if kept.get("steps") == record["steps"]:
            return kept
        if self.accelerator.is_main_process:
            with refreshed_card(self.adapter):
                write_json(path, record)
        return record

    def record(self, num_images: int | None, images_per_step: int, state: dict[str, Any]) -> dict[str, Any]:
        """The content of `training.json`; `state` is the state that checkpoints hold."""
        a, accelerator, best = self.arguments, self.accelerator, state["best"]
        return {
            "command": command(),
            "arguments": asdict(a),
            "data": {"name": data_name(a.data), "num_images": num_images},
            "steps": state["step"],
            "images_seen": state["step"] * images_per_step,
            "unreadable_images": len(state["unreadable"]),
            "seconds": round(state["seconds"], 1),
            "best_step": best["step"],
            "best_validation": best["validation"],
            "seed": a.seed,
            "mixed_precision": accelerator.mixed_precision,
            "versions": versions(),
            "hardware": f"{accelerator.num_processes} × {hardware(accelerator.device)}",
        }
