"""AOTInductor: compile a graph ahead of time into one package, which runs without Dynamo and without this library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ..errors import UnsupportedModelError, first_line
from .graph import INPUT_NAME


def write_package(program: ExportedProgram, path: Path) -> list[Path]:
    """Compile a graph for its device into a package, with the weights. Returns the file.

    Raises UnsupportedModelError if compiling fails. On a CPU it needs a C++ compiler.
    """
    try:
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    except Exception as error:  # the compiler's errors have no common base class
        raise UnsupportedModelError(f"AOTInductor cannot compile this model here: {first_line(error)}") from error
    return [path]


class PackageRunner:
    """Runs a package: pixels [B, C, H, W] -> tensors. It holds native code: load only packages that you trust."""

    def __init__(self, path: Path) -> None:
        self._run: Any = torch._inductor.aoti_load_package(str(path))

    def __call__(self, pixel_values: Tensor) -> list[Tensor]:
        return list(self._run(**{INPUT_NAME: pixel_values}))
