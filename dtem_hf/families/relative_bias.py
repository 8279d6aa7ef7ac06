"""Relative position bias for merged tokens, in BEiT and Data2Vec-Vision.

A merged token has the bias of one patch: the patch nearest to the size-weighted mean position of its patches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..token_state import TokenState
from .layer import LayerMerging


def grid_places(height: int, width: int, num_prefix_tokens: int, device: torch.device) -> Tensor:
    """Row and column of every token: [P + height · width, 2] float32; prefix tokens have 0, 0."""
    rows, columns = torch.meshgrid(
        torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
    )
    places = torch.stack([rows.flatten(), columns.flatten()], dim=-1).float()
    return torch.cat([places.new_zeros(num_prefix_tokens, 2), places])


# A mean of up to about 4,000 whole coordinates is halfway between two, or further than this from halfway.
_RESOLUTION = 2.0**-12


def nearest_tokens(positions: Tensor, width: int, num_prefix_tokens: int) -> Tensor:
    """The original token nearest to each token's position: [B, n, 2] -> [B, n] int64; for prefix tokens, themselves.

    Halfway between two rows or columns, it is the even one, whatever the rounding error of the mean.
    """
    places = (positions[:, num_prefix_tokens:] / _RESOLUTION).round() * _RESOLUTION
    rows, columns = places.round().long().unbind(-1)
    prefix = torch.arange(num_prefix_tokens, device=positions.device).expand(positions.shape[0], -1)
    return torch.cat([prefix, rows * width + columns + num_prefix_tokens], dim=1)


def gather_bias(bias: Tensor, state: TokenState, layer: int, width: int) -> Tensor:
    """The bias [B, H, n, n] of the tokens that enter a layer, from the bias [1, H, N, N]; `width` is the grid's."""
    positions = state.positions(layer)
    if not state.has_merged(layer) or positions is None:
        return bias
    tokens = nearest_tokens(positions, width, state.num_prefix_tokens)
    return bias[0][:, tokens.unsqueeze(2), tokens.unsqueeze(1)].transpose(0, 1)


def add_biases(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The sum of two additive masks, either of which may be absent."""
    return other if one is None else one if other is None else one + other


class RelativeBiasMerging(LayerMerging):
    """Layers whose tokens have positions on a grid; `grid` is its number of rows and of columns."""

    def place_tokens(self, hidden_states: Tensor, grid: tuple[int, int], state: TokenState) -> None:
        """Set the positions of the first layer's tokens."""
        if self.merge_index == 0:
            places = grid_places(*grid, state.num_prefix_tokens, hidden_states.device)
            state.place(places.expand(hidden_states.shape[0], -1, -1))

    def bias_with_sizes(
        self: Any, hidden_states: Tensor, relative: Tensor | None, state: TokenState, grid: tuple[int, int]
    ) -> Tensor | None:
        """The relative position bias [1, H, N, N], gathered for merged tokens, plus log sizes."""
        if relative is None or not state.has_merged(self.merge_index):
            return LayerMerging.attention_inputs(self, hidden_states, relative, state, {})
        sizes = LayerMerging.attention_inputs(self, hidden_states, None, state, {})
        return add_biases(gather_bias(relative, state, self.merge_index, grid[1]), sizes)
