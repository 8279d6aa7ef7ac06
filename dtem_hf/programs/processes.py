"""The processes of one launch: whether they know each other, and the device of this one."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import torch

from ..errors import need


if TYPE_CHECKING:
    from accelerate import PartialState


def known_processes() -> PartialState:
    """This process among those that were launched together. Raises RuntimeError where Accelerate sees fewer."""
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
    """The device of this process; `auto` takes an accelerator if there is one."""
    return known_processes().device if name == "auto" else torch.device(name)


def say(text: str) -> None:
    """Tell the user something on stderr, once for all processes of a launch."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)
