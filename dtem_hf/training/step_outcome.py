"""The outcome of an optimiser step over all processes, gathered in one collective operation."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from . import checkpoints


class StepOutcome(NamedTuple):
    """Losses [processes, batches], the largest gradient norm, whether to stop, and the number of unreadable images."""

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
        """Whether all losses are finite."""
        return bool(self.losses.isfinite().all())


def gather_outcome(
    accelerator: Accelerator, losses: list[Tensor], norm: Tensor, stop: bool, unreadable: int
) -> StepOutcome:
    """Gather the outcome of a step; each process gives its losses (scalars), gradient norm, stop flag and count."""
    own = [*losses, norm, torch.tensor(float(stop)), torch.tensor(float(unreadable))]
    row = torch.stack([value.to(accelerator.device, torch.float32) for value in own])
    table = accelerator.gather(row[None]).cpu()  # [processes, batches + 3]
    norms, stops, counts = table[:, -3:].unbind(dim=1)
    largest = norms.max() if norms.isfinite().all() else torch.tensor(torch.nan)
    return StepOutcome(table[:, :-3], largest.item(), bool(stops.any()), int(counts.sum()))


def raise_not_finite(
    accelerator: Accelerator, outcome: StepOutcome, step: int, names: list[list[str]], folder: Path
) -> NoReturn:
    """Raise FloatingPointError in every process; it names the images of all batches that may have caused it.

    `names` are the image names of this process's batches.
    """
    finite = outcome.losses[accelerator.process_index].isfinite().tolist()
    if outcome.losses_are_finite:
        what, suspects = "the gradient is not finite", names
    else:
        what = f"loss is {outcome.loss}"
        suspects = [batch for batch, fine in zip(names, finite, strict=True) if not fine]
    images = gather_object([name for batch in suspects for name in batch])
    raise FloatingPointError(
        f"{what} at step {step}, images [{', '.join(images)}]; {checkpoints.last_good(folder)}. "
        "Look at these images, lower lr, or start from init='keys'."
    )
