"""What the processes of a run tell each other behind every step, in one message."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from . import checkpoints


class Facts(NamedTuple):
    """Of a step, over all processes: losses [processes, batches], the largest gradient norm, and what happened."""

    losses: Tensor
    norm: float
    stop: bool
    unreadable: int

    @property
    def loss(self) -> float:
        """The mean loss."""
        return self.losses.mean().item()

    @property
    def losses_are_finite(self) -> bool:
        """Whether all of them are."""
        return bool(self.losses.isfinite().all())


def exchange(accelerator: Accelerator, losses: list[Tensor], norm: Tensor, stop: bool, unreadable: int) -> Facts:
    """Tell the other processes of this one's losses (scalars), and hear of theirs."""
    own = [*losses, norm, torch.tensor(float(stop)), torch.tensor(float(unreadable))]
    row = torch.stack([value.to(accelerator.device, torch.float32) for value in own])
    table = accelerator.gather(row[None]).cpu()  # [processes, batches + 3]
    norms, stops, counts = table[:, -3:].unbind(dim=1)
    largest = norms.max() if norms.isfinite().all() else torch.tensor(torch.nan)
    return Facts(table[:, :-3], largest.item(), bool(stops.any()), int(counts.sum()))


def raise_not_finite(
    accelerator: Accelerator, facts: Facts, step: int, names: list[list[str]], folder: Path
) -> NoReturn:
    """Raise FloatingPointError in every process, with the images of all batches that may have caused it.

    `names` are those of this process's batches.
    """
    own = facts.losses[accelerator.process_index].isfinite().tolist()
    innocent = own if not facts.losses_are_finite else [False] * len(own)
    suspects = [name for batch, fine in zip(names, innocent, strict=True) if not fine for name in batch]
    what = "the gradient is not finite" if facts.losses_are_finite else f"loss is {facts.loss}"
    raise FloatingPointError(
        f"{what} at step {step}, images [{', '.join(gather_object(suspects))}]; {checkpoints.last_good(folder)}. "
        "Look at these images, lower lr, or start from init='keys'."
    )
