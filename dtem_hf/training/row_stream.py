"""Batches of a streamed dataset, in a new order every epoch, starting at any position."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from datasets import IterableDataset, concatenate_datasets
from datasets.distributed import split_dataset_by_node
from torch.utils.data import Sampler

from ..errors import BadValue
from ..opening import row_name


# The number of batches whose image names are kept; enough for a step and for the batches that workers read ahead.
_NAMES_KEPT = 256


class _Block(NamedTuple):
    """Rows that are shuffled together, the dataset's state before them, and the number of the first row."""

    epoch: int
    state: dict[str, Any]
    first: int
    rows: list[dict[str, Any]]


class RowStream(Sampler[list[tuple[int, int, dict[str, Any]]]]):
    """`num_batches` batches of (epoch, number, row) for one of `world_size` processes.

    Every epoch puts the shards of a process in a new order and shuffles their rows in blocks of `buffer_size`; the
    next block is read while the present one is used. If the processes cannot share the shards evenly, each process
    reads all shards and keeps every `world_size`-th row. The batches after batch b depend only on `position_after(b)`.
    """

    def __init__(
        self,
        rows: IterableDataset,
        batch_size: int,
        num_batches: int,
        seed: int,
        buffer_size: int = 1000,
        rank: int = 0,
        world_size: int = 1,
        position: dict[str, Any] | None = None,
    ) -> None:
        self.rows = split_dataset_by_node(rows, rank, world_size)
        self.batch_size, self.num_batches, self.seed, self.buffer_size = batch_size, num_batches, seed, buffer_size
        self.rank, self.world_size = rank, world_size
        self._start = position or {"epoch": 0, "state": None, "first": 0, "used": 0}
        self._positions: dict[int, dict[str, Any]] = {}
        self._names: deque[tuple[int, str]] = deque(maxlen=_NAMES_KEPT * batch_size)

    def __len__(self) -> int:
        return self.num_batches

    def position_after(self, batch: int) -> dict[str, Any]:
        """The position after batch number `batch` of this stream, from 0. Call it with rising numbers only."""
        for earlier in [number for number in self._positions if number < batch]:
            del self._positions[earlier]
        return self._positions[batch]

    def name_of(self, number: int) -> str:
        """The name of one of the latest rows."""
        return dict(self._names).get(number, str(number))

    def __iter__(self) -> Iterator[list[tuple[int, int, dict[str, Any]]]]:
        used = self._start["used"]
        batch: list[tuple[int, int, dict[str, Any]]] = []
        number = 0
        for block in self._read_ahead() if self.num_batches else ():
            order = np.random.default_rng((self.seed, self.rank, block.first)).permutation(len(block.rows))
            for place in range(used, len(order)):
                # Other processes have the numbers in between, so that no two images get the same augmentation.
                identity = (block.first + place) * self.world_size + self.rank
                row = block.rows[order[place]]
                batch.append((block.epoch, identity, row))
                self._names.append((identity, row_name(row, identity)))
                if len(batch) == self.batch_size:
                    self._positions[number] = {
                        "epoch": block.epoch,
                        "state": block.state,
                        "first": block.first,
                        "used": place + 1,
                    }
                    yield batch
                    batch, number = [], number + 1
                    if number == self.num_batches:
                        return
            used = 0

    def _read_ahead(self) -> Iterator[_Block]:
        blocks = self._blocks()
        with ThreadPoolExecutor(1) as reader:
            upcoming = reader.submit(next, blocks)
            while True:
                block = upcoming.result()
                upcoming = reader.submit(next, blocks)
                yield block

    def _blocks(self) -> Iterator[_Block]:
        epoch, state, first = self._start["epoch"], self._start["state"], self._start["first"]
        while True:
            rows = self._in_order_of(epoch)
            if state is not None:
                rows.load_state_dict(state)
            before, arriving = rows.state_dict() if state is None else state, iter(rows)
            empty = state is None
            while block := list(islice(arriving, self.buffer_size)):
                yield _Block(epoch, before, first, block)
                before, first, empty = rows.state_dict(), first + len(block), False
            if empty:
                raise BadValue("data", "a stream without rows", f"images for each of {self.world_size} processes")
            epoch, state = epoch + 1, None

    def _in_order_of(self, epoch: int) -> IterableDataset:
        count = self.rows.num_shards
        order = np.random.default_rng((self.seed, epoch)).permutation(count)
        return concatenate_datasets([self.rows.shard(count, int(shard)) for shard in order])
