"""The order in which a run sees its images: one endless stream of permutations that can be entered anywhere."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class ImageStream(Sampler[list[tuple[int, int]]]):
    """Batches `first` to `last` of the stream, as lists of (epoch, index).

    Image g of the stream is image g mod n of permutation g // n, so cutting the stream into other batches, or over
    more processes, changes nothing about it.
    """

    drop_last = True  # read by accelerate, which deals the batches out to the processes

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
