"""A relative position bias that follows merged tokens: what BEiT and Data2Vec-Vision share.

A merged token takes the place of the patch that is nearest to the size-weighted mean of its patches' places: its bias
to another is the one that these two places have.
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


# A mean of whole coordinates is a tie, or further from one than this, for up to some 4,000 patches in a token.
_RESOLUTION = 2.0**-12


def nearest_tokens(positions: Tensor, width: int, num_prefix_tokens: int) -> Tensor:
    """The original token nearest to each token's place: [B, n, 2] -> [B, n] int64; prefix tokens are their own.

    Halfway between two, the even row or column, whatever the rounding of the mean was.
    """
    places = (positions[:, num_prefix_tokens:] / _RESOLUTION).round() * _RESOLUTION
    rows, columns = places.round().long().unbind(-1)
    prefix = torch.arange(num_prefix_tokens, device=positions.device).expand(positions.shape[0], -1)
    return torch.cat([prefix, rows * width + columns + num_prefix_tokens], dim=1)


def follow(bias: Tensor, state: TokenState, layer: int, width: int) -> Tensor:
    """A bias [1, H, N, N] between the tokens that entered a layer: [B, H, n, n]; `width` is the grid's."""
    positions = state.positions(layer)
    if not state.has_merged(layer) or positions is None:
        return bias
    tokens = nearest_tokens(positions, width, state.num_prefix_tokens)
    return bias[0][:, tokens.unsqueeze(2), tokens.unsqueeze(1)].transpose(0, 1)


def add_biases(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The sum of two additive masks, either of which may be absent."""
    return other if one is None else one if other is None else one + other


class RelativeBiasMerging(LayerMerging):
    """Layers whose tokens have a place on a grid; `grid` is the number of its rows and columns."""

    def place_tokens(self, hidden_states: Tensor, grid: tuple[int, int], state: TokenState) -> None:
        """Say where the tokens of the first layer lie."""
        if self.merge_index == 0:
            places = grid_places(*grid, state.num_prefix_tokens, hidden_states.device)
            state.place(places.expand(hidden_states.shape[0], -1, -1))

    def bias_with_sizes(
        self: Any, hidden_states: Tensor, relative: Tensor | None, state: TokenState, grid: tuple[int, int]
    ) -> Tensor | None:
        """The bias [1, H, N, N] of the tokens as they came, followed to where they are now, and log sizes."""
        if relative is None or not state.has_merged(self.merge_index):
            return LayerMerging.attention_inputs(self, hidden_states, relative, state, {})
        sizes = LayerMerging.attention_inputs(self, hidden_states, None, state, {})
        return add_biases(follow(relative, state, self.merge_index, grid[1]), sizes)
