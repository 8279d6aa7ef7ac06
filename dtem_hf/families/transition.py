"""Stand-ins until the layers are described as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn


def has_own_weight(module: Any) -> bool:
    return type(module) is nn.Linear and not module.weight.is_meta


def takes_more(module: Any) -> bool:
    return False


class LayerParts(NamedTuple):
    norm1: Any
    attention: Any
    norm2: Any
    mlp: Any
    idle: Any = ()
    scales: Any = None


def run_fused(*args: Any) -> Any:
    return None


@dataclass
class AttentionPass:
    num_rows: int | None = None
    merged: bool = False
    keys: Tensor | None = None

    def rows(self, x: Tensor) -> Tensor:
        return x


class OpenAttention:
    pass


class OpenCLIPAttention(OpenAttention):
    pass


def opens(*args: Any) -> bool:
    return False


class OpenMLP:
    pass


def opens_mlp(mlp: Any) -> bool:
    return False


def drop(dropout: nn.Module, x: Tensor) -> Tensor:
    return dropout(x)
