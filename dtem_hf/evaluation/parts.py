"""Finished batches of an evaluation on disk, one file each: an interruption loses at most one batch per process."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from ..errors import BadValue
from ..files import read_json, replacing, write_json
from ..programs.identity import digest
from ..programs.processes import known_processes
from ..progress import tqdm


# Arrays by name. The first dimension is the image; for `seconds_per_image`, the batch.
Columns = dict[str, NDArray[Any]]
_RUN_NAME = "run.json"


class Measure(NamedTuple):
    """A model and the functions that measure it, by its classes or by its features.

    `batch` takes variants, a batch, the device and the row to start with, and returns columns. `rows` takes variants
    and the columns of all images. Labels must be below `num_labels`; None allows any. `facts` go into the run and its
    result.
    """

    model: Any
    num_labels: int | None
    batch: Callable[..., Columns]
    rows: Callable[..., list[dict[str, Any]]]
    facts: dict[str, Any]


class Parts:
    """The finished batches of one run, in a folder that all its processes share.

    `run` holds all that the results depend on, as JSON. Every file name contains its digest, so parts of another run
    are never read. Raises ValueError if the folder holds a different unfinished run, unless `resume` is "never".
    """

    def __init__(self, folder: Path, run: dict[str, Any], resume: str) -> None:
        self.folder, self.run, self.digest = folder, run, digest(run)
        self.state = known_processes()
        self._finished = folder.with_name(f".{folder.name}.finished")
        if self.state.is_main_process:
            shutil.rmtree(self._finished, ignore_errors=True)  # left by a run that was killed during `finish`
            if resume == "never":
                shutil.rmtree(folder, ignore_errors=True)
        self.state.wait_for_everyone()
        if (folder / _RUN_NAME).is_file():
            before = read_json(folder / _RUN_NAME)
            for name, value in run.items():
                if before.get(name) != value:
                    raise BadValue(
                        name,
                        value,
                        f"the unfinished run in {folder} has {before.get(name)!r}; use that, choose another "
                        "output_dir, or pass --resume never to start over",
                    )
        self.state.wait_for_everyone()  # all have checked before one writes

    def measure(
        self,
        images: Any,
        batch_size: int,
        measure: Callable[[Any, int], Columns],
        title: str,
        num_workers: int = 0,
        collate: Any = None,
    ) -> Columns:
        """Measure this process's share of the unfinished batches, and return the columns of all batches.

        `measure` takes a batch and its number. Batches, and so figures, are the same for any number of processes. The
        first batch of a process warms up, and the last batch may be smaller: neither is timed. Raises
        FileNotFoundError if a batch of another process is not in the folder.
        """
        batches = batches_of(len(images), batch_size)
        missing = [number for number in range(len(batches)) if not self._path(number).is_file()]
        self.state.wait_for_everyone()  # all have looked before one writes
        mine = missing[self.state.process_index :: self.state.num_processes]
        sampler = [list(batches[number]) for number in mine]
        loader = DataLoader(images, batch_sampler=sampler, collate_fn=collate, num_workers=num_workers)
        progress = tqdm(loader, desc=title, unit="batch", disable=not self.state.is_main_process)
        if len(missing) < len(batches) and self.state.is_main_process:
            progress.write(f"{len(batches) - len(missing)} of {len(batches)} batches were finished before")
        for place, (number, batch) in enumerate(zip(mine, progress, strict=True)):
            columns = measure(batch, number)
            if place == 0 or len(batches[number]) < len(batches[0]):
                columns["seconds_per_image"][:] = np.nan
            if place == 0:  # from now on the run can resume; every process writes the same content
                write_json(self.folder / _RUN_NAME, self.run)
            with replacing(self._path(number)) as temporary, open(temporary, "wb") as file:
                np.savez(file, **columns)  # type: ignore[arg-type]
        self.state.wait_for_everyone()
        return self._read(len(batches))

    def _read(self, num_batches: int) -> Columns:
        parts = []
        for number in range(num_batches):
            if not self._path(number).is_file():
                raise FileNotFoundError(f"{self._path(number)}: output_dir must be one folder that all processes see")
            with np.load(self._path(number), allow_pickle=False) as arrays:
                parts.append({name: arrays[name] for name in arrays.files})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def finish(self, keep: Callable[[], None]) -> None:
        """Call `keep` in the main process, and then remove the parts."""
        self.state.wait_for_everyone()  # all have read the parts
        if self.state.is_main_process:
            keep()
            self.folder.rename(self._finished)
            shutil.rmtree(self._finished, ignore_errors=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"{self.digest}-{number:08d}.npz"


def batches_of(num_items: int, batch_size: int) -> list[Sequence[int]]:
    """Split items into batches, the last of which may be smaller."""
    return [range(start, min(start + batch_size, num_items)) for start in range(0, num_items, batch_size)]
