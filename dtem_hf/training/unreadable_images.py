"""Leave out unreadable images: a readable image of the same batch replaces each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import UnreadableImage


# Key in a batch: [B], whether an item replaces an unreadable image.
IS_REPLACEMENT = "is_replacement"
# Key in a batch: the error messages of the unreadable images, if there are any.
UNREADABLE = "unreadable"


@dataclass
class ErrorsAsItems(Dataset[Any]):
    """A data set that returns the error for an unreadable image instead of raising it."""

    items: Any

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, item: Any) -> Any:
        try:
            return self.items[item]
        except UnreadableImage as error:
            return error


@dataclass
class ReplaceErrors:
    """A collate function that replaces errors among the items by readable items of the batch.

    Batches keep their size, so that all processes take the same steps. Raises UnreadableImage if no item is readable.
    """

    collate: Callable[[Sequence[Any]], dict[str, Tensor]]

    def __call__(self, items: Sequence[Any]) -> dict[str, Any]:
        readable = [item for item in items if not isinstance(item, UnreadableImage)]
        errors = [str(item) for item in items if isinstance(item, UnreadableImage)]
        if not readable:
            raise items[0]
        replaced = [isinstance(item, UnreadableImage) for item in items]
        batch = self.collate([readable[i % len(readable)] if bad else items[i] for i, bad in enumerate(replaced)])
        return {**batch, IS_REPLACEMENT: torch.tensor(replaced), **({UNREADABLE: errors} if errors else {})}
