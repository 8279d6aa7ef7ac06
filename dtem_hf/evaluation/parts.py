"""Finished batches of an evaluation on disk, one file each: an interruption loses at most one batch per process."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
from .arguments import ResumableArguments


# Arrays by name. The first dimension is the image; for `seconds_per_image`, the batch.
Columns = dict[str, NDArray[Any]]
_RUN_NAME = "run.json"


class Measure(NamedTuple):
    """A model and the functions that measure it, by its classes or by its features.

    `batch` takes variants, the device, a batch and the row to start with, and returns columns. `rows` takes variants
    and the columns of all images. Labels must be below `num_labels`; None allows any. `facts` go into the run and its
    result.
    """

    model: Any
    num_labels: int | None
    batch: Callable[..., Columns]
    rows: Callable[..., list[dict[str, Any]]]
    facts: dict[str, Any]


@contextmanager
def measured(
    arguments: ResumableArguments,
    run: dict[str, Any],
    images: Any,
    measure: Callable[[Any, int], Columns],
    title: str,
    collate: Any = None,
) -> Iterator[Columns]:
    """Measure the unfinished batches, shared by all processes, and yield the columns of all batches.

    `run` holds all that the results depend on, as JSON. The files are in `output_dir/parts`; every name contains the
    run's digest, so parts of another run are never read. They are removed if the block, which writes the results, ends
    without an error. `measure` takes a batch and its number. Batches, and so figures, are the same for any number of
    processes. The first batch of a process warms up, and the last batch may be smaller: neither is timed. Raises
    ValueError if the folder holds a different unfinished run, unless `resume` is "never", and FileNotFoundError if a
    batch of another process is not in the folder.
    """
    state, folder = known_processes(), Path(arguments.output_dir) / "parts"
    finished = folder.with_name(f".{folder.name}.finished")
    if state.is_main_process:
        shutil.rmtree(finished, ignore_errors=True)  # left by a run that was killed while it removed its parts
        if arguments.resume == "never":
            shutil.rmtree(folder, ignore_errors=True)
    state.wait_for_everyone()
    if (folder / _RUN_NAME).is_file():
        _check_same_run(read_json(folder / _RUN_NAME), run, folder)
    batches = batches_of(len(images), arguments.batch_size)
    paths = [folder / f"{digest(run)}-{number:08d}.npz" for number in range(len(batches))]
    missing = [number for number, path in enumerate(paths) if not path.is_file()]
    state.wait_for_everyone()  # all have looked before one writes
    mine = missing[state.process_index :: state.num_processes]
    sampler = [list(batches[number]) for number in mine]
    loader = DataLoader(images, batch_sampler=sampler, collate_fn=collate, num_workers=arguments.num_workers)
    progress = tqdm(loader, desc=title, unit="batch", disable=not state.is_main_process)
    if len(missing) < len(batches) and state.is_main_process:
        progress.write(f"{len(batches) - len(missing)} of {len(batches)} batches were finished before")
    for place, (number, batch) in enumerate(zip(mine, progress, strict=True)):
        columns = measure(batch, number)
        if place == 0 or len(batches[number]) < len(batches[0]):
            columns["seconds_per_image"][:] = np.nan
        if place == 0:  # from now on the run can resume; every process writes the same content
            write_json(folder / _RUN_NAME, run)
        with replacing(paths[number]) as temporary, open(temporary, "wb") as file:
            np.savez(file, **columns)  # type: ignore[arg-type]
    state.wait_for_everyone()
    found = _read(paths)
    state.wait_for_everyone()  # all have read before one removes
    yield found
    if state.is_main_process:
        folder.rename(finished)
        shutil.rmtree(finished, ignore_errors=True)


def _read(paths: Sequence[Path]) -> Columns:
    parts = []
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: output_dir must be one folder that all processes see")
        with np.load(path, allow_pickle=False) as arrays:
            parts.append({name: arrays[name] for name in arrays.files})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def batches_of(num_items: int, batch_size: int) -> list[Sequence[int]]:
    """Split items into batches, the last of which may be smaller."""
    return [range(start, min(start + batch_size, num_items)) for start in range(0, num_items, batch_size)]


def _check_same_run(before: dict[str, Any], run: dict[str, Any], folder: Path) -> None:
    advice = "use that, choose another output_dir, or pass --resume never to start over"
    for name, value in run.items():
        if before.get(name) != value:
            raise BadValue(name, value, f"the unfinished run in {folder} has {before.get(name)!r}; {advice}")
