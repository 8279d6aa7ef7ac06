"""Checkpoints of a run: written whole or not at all, found again, and thinned out."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..files import read_json, write_json


STATE_NAME = "run_state.json"


def keep_only_learned(models: list[Any], weights: list[dict[str, Any]], output_dir: str) -> None:
    """Hook for `Accelerator.save_state`: the frozen backbone is not written again with every checkpoint."""
    for model, state in zip(models, weights, strict=True):
        learned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        for key in [key for key in state if key not in learned]:
            del state[key]


def save(accelerator: Accelerator, folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint under a temporary name and rename it; then remove all but the newest `keep`."""
    final = folder / f"step-{step:08d}"
    partial = folder / f".partial-{step:08d}"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(partial / STATE_NAME, state)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in complete(folder)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def complete(folder: Path) -> list[Path]:
    """The checkpoints in a folder that were finished, oldest first."""
    found = (path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8}", path.name))
    return sorted(path for path in found if (path / STATE_NAME).is_file())


def load(accelerator: Accelerator, checkpoint: Path) -> dict[str, Any]:
    """Put optimiser, schedule, random numbers and learned weights back; returns what was saved beside them."""
    accelerator.load_state(str(checkpoint), strict=False)
    return read_json(checkpoint / STATE_NAME)
