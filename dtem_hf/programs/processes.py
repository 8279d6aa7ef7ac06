"""The processes of one launch: check that they know each other, and choose the device of this process."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import torch

from ..errors import BadValue, need


if TYPE_CHECKING:
    from accelerate import PartialState


def known_processes() -> PartialState:
    """Accelerate's state of the launched processes. Raises RuntimeError if it does not see all of them."""
    need("train", "a program of dtem_hf", "accelerate")
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    state = PartialState(parse_flag_from_env("ACCELERATE_USE_CPU"))
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != state.num_processes:
        raise RuntimeError(
            f"{launched} processes were launched and Accelerate sees {state.num_processes}: "
            "without an accelerator, set ACCELERATE_USE_CPU=true and launch with torchrun"
        )
    return state


def choose_device(name: str) -> torch.device:
    """The device of this process; `auto` takes an accelerator if there is one.

    Raises ValueError for a name that torch does not know, and for a device that does not work on this machine.
    """
    state = known_processes()
    if name == "auto":
        return state.device
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()  # fails without the hardware, its driver, or a torch build for it
    except (RuntimeError, AssertionError, ImportError) as error:
        kind = torch.accelerator.current_accelerator(check_available=True)
        here = ["cpu", *(f"{kind}:{i}" for i in range(torch.accelerator.device_count()))]
        reason = str(error).strip().partition("\n")[0]
        raise BadValue("device", name, f"auto, or one of this machine: {', '.join(here)} ({reason})") from error
    return device


def say(text: str) -> None:
    """Print a message on stderr, once for all processes of a launch."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)
