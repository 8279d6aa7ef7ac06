"""What an evaluation has finished, on disk: one file per batch, so that an interruption loses one batch at most."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray

from ..errors import BadValue
from ..files import read_json, replacing, write_json


Columns = dict[str, NDArray[Any]]
_RUN_NAME = "run.json"


def processes() -> Accelerator:
    """This process among those that were launched together. Raises RuntimeError where they do not know each other."""
    accelerator = Accelerator()
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != accelerator.num_processes:
        raise RuntimeError(
            f"{launched} processes were launched and Accelerate sees {accelerator.num_processes}: "
            "without an accelerator, set ACCELERATE_USE_CPU=true and launch with torchrun"
        )
    return accelerator


class Parts:
    """The finished batches of one run, in a folder that all its processes share.

    `run` is what the results depend on, as JSON: parts of another run are not mixed in.
    """

    def __init__(self, folder: Path, run: dict[str, Any], resume: str) -> None:
        self.folder = folder
        self.state = processes()
        if self.state.is_main_process and resume == "never":
            shutil.rmtree(folder, ignore_errors=True)
        self.state.wait_for_everyone()
        if (folder / _RUN_NAME).is_file():
            _check_same_run(read_json(folder / _RUN_NAME), run, folder)
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            write_json(folder / _RUN_NAME, run)
        self.state.wait_for_everyone()

    def finished(self) -> set[int]:
        """The numbers of the batches that are done."""
        names = (re.fullmatch(r"part-(\d+)\.npz", path.name) for path in self.folder.glob("part-*.npz"))
        return {int(name[1]) for name in names if name}

    def share(self, num_batches: int) -> list[int]:
        """The unfinished batches that this process has to do; every process must ask before one writes."""
        missing = sorted(set(range(num_batches)) - self.finished())
        self.state.wait_for_everyone()
        return missing[self.state.process_index :: self.state.num_processes]

    def write(self, number: int, columns: Mapping[str, NDArray[Any]]) -> None:
        """Keep a batch's results, whole or not at all."""
        with replacing(self._path(number)) as temporary, open(temporary, "wb") as file:
            np.savez(file, **columns)  # type: ignore[arg-type]

    def read(self, num_batches: int) -> list[Columns]:
        """The results of all batches, in order. Raises FileNotFoundError where one is missing."""
        parts = []
        for number in range(num_batches):
            if not self._path(number).is_file():
                raise FileNotFoundError(f"{self._path(number)}: output_dir must be one folder that all processes see")
            with np.load(self._path(number), allow_pickle=False) as arrays:
                parts.append({name: arrays[name] for name in arrays.files})
        return parts

    def remove(self) -> None:
        """Clear up behind a run that is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{number:08d}.npz"


def weights_digest(tensors: Mapping[str, Any]) -> str:
    """A hash of a state dict, by which a run knows its model again."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def batches_of(num_items: int, batch_size: int) -> list[Sequence[int]]:
    """Items in batches, the same ones for any number of processes: the last may be smaller."""
    return [range(start, min(start + batch_size, num_items)) for start in range(0, num_items, batch_size)]


def _check_same_run(before: dict[str, Any], run: dict[str, Any], folder: Path) -> None:
    for name, value in run.items():
        if before.get(name) != value:
            raise BadValue(
                name,
                value,
                f"the unfinished run in {folder} has {before.get(name)!r}; go on with that, choose another "
                "output_dir, or pass --resume never to start over",
            )
