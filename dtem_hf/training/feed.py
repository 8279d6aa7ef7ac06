"""The training batches of a process, starting at any step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from ..errors import BadValue
from .arguments import TrainArguments
from .interruption import leave_signals_to_the_parent
from .row_stream import RowStream
from .tasks.base import TaskData
from .unreadable_images import ErrorsAsItems, ReplaceErrors


class Feed(ABC):
    """The batches of this process, and its position in the data for checkpoints."""

    def __init__(self, arguments: TrainArguments, accelerator: Accelerator, data: TaskData) -> None:
        self.arguments, self.accelerator, self.data = arguments, accelerator, data
        self.per_step = arguments.gradient_accumulation_steps

    @abstractmethod
    def batches(self, step: int, state: Any) -> Iterator[dict[str, Tensor]]:
        """The batches from `step` to the last step; `state` is the value of `state_after(step)`."""

    @abstractmethod
    def names(self, batch: dict[str, Any]) -> list[str]:
        """The image names of one of the latest batches."""

    def state_after(self, step: int) -> Any:
        """The state of all processes after `step`, for a checkpoint; every process must call it."""
        return None

    def with_shares(
        self, batches: Iterator[dict[str, Tensor]], num_terms: Callable[[dict[str, Tensor]], Tensor | None]
    ) -> Iterator[tuple[dict[str, Tensor], Tensor | float]]:
        """Yield each batch with a factor for its loss, so that a step's mean loss is the mean over all its terms.

        The factor is 1 if all batches have equally many terms (`num_terms` returns None). Otherwise all batches of a
        step are read before the first is used.
        """
        for first in batches:
            if num_terms(first) is None:
                yield first, 1.0
                continue
            group = [first, *islice(batches, self.per_step - 1)]
            counts = torch.stack([num_terms(batch) for batch in group]).float()  # type: ignore[misc]
            yield from zip(group, counts / self.accelerator.reduce(counts.mean(), reduction="mean"), strict=True)


class IndexedFeed(Feed):
    """Batches of a data set with a length; the step number is the position."""

    def batches(self, step: int, state: Any) -> Iterator[dict[str, Tensor]]:
        a, per_step = self.arguments, self.per_step * self.accelerator.num_processes
        stream = ImageStream(len(self.data.train), a.batch_size, step * per_step, a.steps * per_step, a.seed)
        return iter(self.accelerator.prepare_data_loader(loader(a, self.data, self.data.train, batch_sampler=stream)))

    def names(self, batch: dict[str, Any]) -> list[str]:
        name_of = getattr(self.data.train, "name_of", str)
        return [name_of(index) for index in batch["index"].tolist()]


class StreamedFeed(Feed):
    """Batches of streamed rows; every process has its own position."""

    def batches(self, step: int, state: Any) -> Iterator[dict[str, Tensor]]:
        a, accelerator = self.arguments, self.accelerator
        if state is not None and len(state) != accelerator.num_processes:
            raise BadValue("num_processes", accelerator.num_processes, f"{len(state)}, as in the checkpoint's run")
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


class ImageStream(Sampler[list[tuple[int, int]]]):
    """Batches `first` to `last` of an endless stream of permutations, as lists of (epoch, index).

    Image g of the stream is image g mod n of permutation g // n, for any batch size and number of processes.
    """

    drop_last = True  # accelerate reads this attribute when it distributes batches to processes

    def __init__(self, num_images: int, batch_size: int, first: int, last: int, seed: int) -> None:
        self.num_images, self.batch_size, self.first, self.last, self.seed = num_images, batch_size, first, last, seed

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, torch.empty(0)
        for batch in range(self.first, self.last):
            items = []
            for g in range(batch * self.batch_size, (batch + 1) * self.batch_size):
                if g // self.num_images != epoch:
                    epoch = g // self.num_images
                    generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                    order = torch.randperm(self.num_images, generator=generator)
                items.append((epoch, int(order[g % self.num_images])))
            yield items


def loader(arguments: TrainArguments, data: TaskData, items: Any, **options: Any) -> DataLoader[Any]:
    """A DataLoader over items of a task's data; the option `on_bad_image` applies to unreadable images."""
    collate = data.collate
    if arguments.on_bad_image == "skip":
        items, collate = ErrorsAsItems(items), ReplaceErrors(collate)
    return DataLoader(
        items,
        collate_fn=collate,
        num_workers=arguments.num_workers,
        worker_init_fn=leave_signals_to_the_parent,
        **options,
    )
