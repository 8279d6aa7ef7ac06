"""Unreadable images that are left out: another image of the batch takes the place of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..data.opening import UnreadableImage


# Key in a batch: [B], whether an item stands in for an image that could not be read.
GAPS = "is_gap"
# Key in a batch: the messages of the images that could not be read, if there are any.
REASONS = "unreadable"


@dataclass
class Tolerant(Dataset[Any]):
    """A data set whose unreadable images are handed on as the error they are."""

    items: Any

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, item: Any) -> Any:
        try:
            return self.items[item]
        except UnreadableImage as error:
            return error


@dataclass
class FilledGaps:
    """A collate function that has a readable item of the batch stand in for every one that is not.

    Batches keep their size, so that processes stay in step. Raises UnreadableImage where no item can be read.
    """

    collate: Callable[[Sequence[Any]], dict[str, Tensor]]

    def __call__(self, items: Sequence[Any]) -> dict[str, Any]:
        gaps = [isinstance(item, UnreadableImage) for item in items]
        readable = [item for item, gap in zip(items, gaps, strict=True) if not gap]
        if not readable:
            raise items[0]
        batch = self.collate([readable[i % len(readable)] if gap else items[i] for i, gap in enumerate(gaps)])
        reasons = [str(item) for item, gap in zip(items, gaps, strict=True) if gap]
        return {**batch, GAPS: torch.tensor(gaps), **({REASONS: reasons} if reasons else {})}
