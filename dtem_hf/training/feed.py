"""The batches of a run, on the device of a process, from the step on at which it is entered."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import Tensor
from torch.utils.data import DataLoader

from ..errors import BadValue
from .gaps import FilledGaps, Tolerant
from .interruption import leave_signals_to_the_parent
from .row_stream import RowStream
from .stream import ImageStream


if TYPE_CHECKING:
    from .arguments import TrainArguments
    from .tasks.base import TaskData


class Feed(ABC):
    """Iterated over, it gives batches from `step` on, for each process its own; `state` is what a checkpoint keeps."""

    def __init__(self, arguments: TrainArguments, accelerator: Accelerator, data: TaskData) -> None:
        self.arguments, self.accelerator, self.data = arguments, accelerator, data
        self.per_step = arguments.gradient_accumulation_steps

    @abstractmethod
    def batches(self, step: int, state: Any) -> Iterator[dict[str, Tensor]]:
        """Batches of the steps from `step` on; `state` is what `state_after` gave for it."""

    @abstractmethod
    def names(self, batch: dict[str, Any]) -> list[str]:
        """What the images of one of the last batches are called."""

    def state_after(self, step: int) -> Any:
        """What a checkpoint behind `step` must keep, of all processes; to be called in all of them."""
        return None


class IndexedFeed(Feed):
    """Of a data set with a length: its position is the number of the step."""

    def batches(self, step: int, state: Any) -> Iterator[dict[str, Tensor]]:
        a, per_step = self.arguments, self.per_step * self.accelerator.num_processes
        stream = ImageStream(len(self.data.train), a.batch_size, step * per_step, a.steps * per_step, a.seed)
        return iter(self.accelerator.prepare_data_loader(loader(a, self.data, self.data.train, batch_sampler=stream)))

    def names(self, batch: dict[str, Any]) -> list[str]:
        name_of = getattr(self.data.train, "name_of", str)
        return [name_of(index) for index in batch["index"].tolist()]


class StreamedFeed(Feed):
    """Of rows that are read as they arrive: every process has a position of its own."""

    def batches(self, step: int, state: Any) -> Iterator[dict[str, Tensor]]:
        a, accelerator = self.arguments, self.accelerator
        if state is not None and len(state) != accelerator.num_processes:
            raise BadValue("num_processes", accelerator.num_processes, f"{len(state)}, which read this stream so far")
        self._first = step
        self._stream = RowStream(
            self.data.rows,
            a.batch_size,
            (a.steps - step) * self.per_step,
            a.seed,
            a.shuffle_buffer,
            accelerator.process_index,
            accelerator.num_processes,
            None if state is None else state[accelerator.process_index],
        )
        for batch in loader(a, self.data, self.data.train, batch_sampler=self._stream):
            yield send_to_device(batch, accelerator.device, non_blocking=True)

    def names(self, batch: dict[str, Any]) -> list[str]:
        return [self._stream.name_of(index) for index in batch["index"].tolist()]

    def state_after(self, step: int) -> Any:
        return gather_object([self._stream.position_after((step - self._first) * self.per_step - 1)])


def make_feed(arguments: TrainArguments, accelerator: Accelerator, data: TaskData) -> Feed:
    """The feed that fits the data."""
    return (IndexedFeed if data.rows is None else StreamedFeed)(arguments, accelerator, data)


def loader(arguments: TrainArguments, data: TaskData, items: Any, **options: Any) -> DataLoader[Any]:
    """A DataLoader over items of a task's data; unreadable images are handled as the arguments say."""
    collate = data.collate
    if arguments.on_bad_image == "skip":
        items, collate = Tolerant(items), FilledGaps(collate)
    return DataLoader(
        items,
        collate_fn=collate,
        num_workers=arguments.num_workers,
        worker_init_fn=leave_signals_to_the_parent,
        **options,
    )
