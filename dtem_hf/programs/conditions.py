"""What a result depends on beside its inputs: versions and hardware."""

from __future__ import annotations

import platform
import shlex
import sys
from pathlib import Path

import accelerate
import torch
import transformers

from ..version import __version__


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
    """What a process runs on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    """The processor by its maker's name, and on x86 by family and model, as names are often those of whole lines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    except OSError:  # not Linux
        lines = []
    known = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if "model name" not in known:
        return f"{platform.machine()} CPU"
    numbers = [f"{name} {known[key]}" for name, key in (("family", "cpu family"), ("model", "model")) if key in known]
    return f"{known['model name']} ({', '.join(numbers)})" if numbers else known["model name"]


def command() -> str:
    """The command line that is running, without the folder the program lies in."""
    program = Path(sys.argv[0])
    name = f"recipes/{program.name}" if program.suffix == ".py" else program.name
    return " ".join([name, shlex.join(sys.argv[1:])]).strip()


def data_name(data: str) -> str:
    """What images are called in a record: a Hub id as it is, a local folder by its last two parts."""
    return f"local folder {'/'.join(Path(data).parts[-2:])}" if Path(data).is_dir() else data
