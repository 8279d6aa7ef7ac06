"""What a result depends on beside its inputs: versions and hardware."""

from __future__ import annotations

import platform
import shlex
import sys
from pathlib import Path

import accelerate
import torch
import transformers

from . import __version__
from .ops.compiled import library_version


def versions() -> dict[str, str]:
    """The versions that results depend on."""
    return {
        "dtem_hf": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "python": platform.python_version(),
        "native": library_version(),
    }


def hardware(device: torch.device) -> str:
    """What a process runs on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def command() -> str:
    """The command line that is running, without the folder the program lies in."""
    program = Path(sys.argv[0])
    name = f"recipes/{program.name}" if program.suffix == ".py" else program.name
    return " ".join([name, shlex.join(sys.argv[1:])]).strip()


def data_name(data: str) -> str:
    """What images are called in a record: a Hub id as it is, a local folder by its last two parts."""
    return f"local folder {'/'.join(Path(data).parts[-2:])}" if Path(data).is_dir() else data
