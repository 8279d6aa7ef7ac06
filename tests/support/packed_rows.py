"""Qwen's vision towers: images and videos as rows of patches below each other, joined in squares behind the layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.support.family_case import PATCH, Inputs
from tests.support.slow_model import Anatomy, Outputs
from tests.support.slow_parts import Weights, gelu, layer_norm, linear


SQUARE, FRAMES = 2, 2
Grids = Sequence[tuple[int, int, int]]
NOT_EXPORTED = "where images begin and end is read from their sizes, in Python, by the plain model as well"


def rows_of(grids: Grids) -> Inputs:
    """Noise for the patches of images and videos of these sizes (pairs of frames, rows and columns of patches)."""
    count = sum(math.prod(grid) for grid in grids)
    noise = torch.randn(count, 3 * FRAMES * PATCH * PATCH, generator=torch.Generator().manual_seed(2))
    return {"hidden_states": noise, "grid_thw": torch.tensor(grids)}


def packed(count: int, height: int = 32, width: int = 32) -> Inputs:
    """Images of one size."""
    return rows_of([(1, height // PATCH, width // PATCH)] * count)


def cells(grid: Tensor) -> list[tuple[int, int]]:
    """Row and column of every patch of an image, in the order in which patches come: square by square."""
    _, height, width = grid.flatten().tolist()
    return [
        (i + down, j + right)
        for i in range(0, height, SQUARE)
        for j in range(0, width, SQUARE)
        for down in range(SQUARE)
        for right in range(SQUARE)
    ]


def places(inputs: Inputs) -> Tensor:
    """In turns: an angle is place times frequency."""
    return torch.tensor(cells(inputs["grid_thw"]), dtype=torch.float64) / math.tau


def joined(x: Tensor) -> Tensor:
    """The four patches of a square behind each other: [N, D] -> [N / 4, 4 D]."""
    return torch.stack([x[i : i + SQUARE**2].flatten() for i in range(0, len(x), SQUARE**2)])


def merger(weights: Weights, name: str, x: Tensor, norm: str, first: str, second: str, after: bool = False) -> Tensor:
    """The map of a square to one feature; the norm is that of a patch or, `after` they are joined, of a square."""
    x = (
        layer_norm(weights, f"{name}.{norm}", joined(x), 1e-6)
        if after
        else joined(layer_norm(weights, f"{name}.{norm}", x, 1e-6))
    )
    return linear(weights, f"{name}.{second}", gelu(linear(weights, f"{name}.{first}", x)))


def tower(
    positions: Callable[[Weights, Inputs], Any], pool: Callable[[Weights, Tensor], Tensor], **changes: Any
) -> Anatomy:
    """A tower without prefix tokens, whose layers are rotary, and whose head reads all patches in place."""

    def embed(weights: Weights, inputs: Inputs) -> Tensor:
        x = inputs["hidden_states"] @ weights["patch_embed.proj.weight"].flatten(1).T
        bias = weights.get("patch_embed.proj.bias", 0.0)
        return x + bias + positions(weights, inputs)

    def head(weights: Weights, x: Tensor, sizes: Tensor) -> Outputs:
        return {"last_hidden_state": x, "pooler_output": pool(weights, x)}

    return Anatomy(
        embed=embed,
        head=head,
        prefix=0,
        layer="blocks.{}.",
        norms=("norm1", "norm2"),
        qkv=("attn.qkv",),
        out="attn.proj",
        eps=1e-6,
        theta=10000.0,
        places=places,
        whole=True,
        **changes,
    )
