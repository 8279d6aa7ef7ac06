"""What a result depends on beside its inputs: versions and hardware."""

from __future__ import annotations

import platform

import accelerate
import torch
import transformers

from . import __version__


def versions() -> dict[str, str]:
    """The versions that results depend on."""
    return {
        "dtem_hf": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "python": platform.python_version(),
    }


def hardware(device: torch.device) -> str:
    """What a process ran on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
