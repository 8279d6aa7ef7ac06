"""AOTInductor: a graph compiled ahead of time into one package, which runs without Dynamo and without this library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ..errors import UnsupportedModelError, first_line
from .graph import INPUT_NAME


def write_package(program: ExportedProgram, path: Path) -> list[Path]:
    """Compile a graph for the device it is on into a package, weights included. Returns the file.

    Raises UnsupportedModelError where compiling fails; on a CPU it needs a C++ compiler.
    """
    try:
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    except Exception as error:  # the compiler's own errors have no common kind
        raise UnsupportedModelError(f"AOTInductor does not compile this model here: {first_line(error)}") from error
    return [path]


class PackageRunner:
    """Runs a package: pixels [B, C, H, W] -> tensors. It holds native code: load only packages that you trust."""

    def __init__(self, path: Path) -> None:
        self._run: Any = torch._inductor.aoti_load_package(str(path))

    def __call__(self, pixel_values: Tensor) -> list[Tensor]:
        return list(self._run(**{INPUT_NAME: pixel_values}))
