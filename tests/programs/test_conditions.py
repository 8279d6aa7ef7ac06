"""What results are said to depend on."""

import platform
from pathlib import Path

import torch

from dtem_hf.programs.conditions import hardware


def test_a_cpu_is_named_as_the_system_names_it() -> None:
    shown, cpuinfo = hardware(torch.device("cpu")), Path("/proc/cpuinfo")
    assert shown.endswith(f", {torch.get_num_threads()} threads")
    names = [
        line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
    ]
    assert shown.startswith(names[0] if names else f"{platform.machine()} CPU")
