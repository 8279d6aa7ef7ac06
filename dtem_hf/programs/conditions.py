"""The conditions of a result for its record: command, model, data, hardware and versions."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers

from ..version import __version__


def conditions(device: torch.device) -> dict[str, Any]:
    """The command line, the machine and the versions of a result."""
    machine = {"hardware": hardware(device), "device": device.type, "threads": torch.get_num_threads()}
    return {"command": command(), **machine, "versions": versions()}


def describe_model(name: str, model: Any) -> dict[str, Any]:
    """A model's name (for a local folder, the last part of its path), type and number of parameters."""
    return {
        "name": os.path.basename(os.path.normpath(name)) if os.path.isdir(name) else name,
        "model_type": model.config.model_type,
        "num_parameters": model.num_parameters(),
    }


def versions(*others: str) -> dict[str, str]:
    """The versions of the packages that results depend on, and of those others that are installed."""
    found = {
        "dtem_hf": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": version("accelerate"),
        "python": platform.python_version(),
    }
    for name in others:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def hardware(device: torch.device) -> str:
    """The processor or GPU that a process runs on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    """The processor's name, on x86 with family and model number, as one name often covers a whole product line."""
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
    """The running command line, without the folder of the program."""
    program = Path(sys.argv[0])
    name = f"recipes/{program.name}" if program.suffix == ".py" else program.name
    return " ".join([name, shlex.join(sys.argv[1:])]).strip()


def data_name(data: str) -> str:
    """The name of a data set in a record: a Hub id, or the last two parts of a local folder."""
    return f"local folder {'/'.join(Path(data).parts[-2:])}" if Path(data).is_dir() else data
