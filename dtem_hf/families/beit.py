"""BEiT: one CLS token, then the patches; a bias by relative position that follows the tokens; weighed means.

A merged token takes the place of the patch that is nearest to the size-weighted mean of its patches' places: its bias
to another is the one that these two places have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.beit.modeling_beit import (
    BeitBackbone,
    BeitForImageClassification,
    BeitForSemanticSegmentation,
    BeitModel,
)

from ..token_state import TokenState
from .base import Backbone, LayerMerging
from .readers import WeighedMean
from .transition import OpenAttention


def grid_places(height: int, width: int, num_prefix_tokens: int, device: torch.device) -> Tensor:
    """Row and column of every token: [P + height · width, 2] float32; prefix tokens have 0, 0."""
    rows, columns = torch.meshgrid(
        torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
    )
    places = torch.stack([rows.flatten(), columns.flatten()], dim=-1).float()
    return torch.cat([places.new_zeros(num_prefix_tokens, 2), places])


# Means of whole coordinates: what is no tie lies further from one than this, up to some 4,000 patches in a token.
_RESOLUTION = 2.0**-12


def nearest_tokens(positions: Tensor, width: int, num_prefix_tokens: int) -> Tensor:
    """The original token nearest to each token's place: [B, n, 2] -> [B, n] int64; prefix tokens are their own.

    Halfway between two, the even row or column, whatever the rounding of the mean was.
    """
    places = (positions[:, num_prefix_tokens:] / _RESOLUTION).round() * _RESOLUTION
    rows, columns = places.round().long().unbind(-1)
    prefix = torch.arange(num_prefix_tokens, device=positions.device).expand(positions.shape[0], -1)
    return torch.cat([prefix, rows * width + columns + num_prefix_tokens], dim=1)


def gather_bias(bias: Tensor, tokens: Tensor) -> Tensor:
    """The bias between the given tokens: [1, H, N, N], [B, n] -> [B, H, n, n]."""
    return bias[0][:, tokens.unsqueeze(2), tokens.unsqueeze(1)].transpose(0, 1)


def add_biases(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The sum of two additive masks, either of which may be absent."""
    return other if one is None else one if other is None else one + other


class RelativeBiasMerging(LayerMerging):
    """What layers of BEiT and Data2Vec share: where their tokens lie."""

    def follow(self: Any, bias: Tensor, resolution: Any, state: TokenState) -> Tensor:
        """A relative position bias [1, H, N, N], between the tokens that entered this layer: [B, H, n, n]."""
        positions = state.positions(self.merge_index)
        if not state.has_merged(self.merge_index) or positions is None:
            return bias
        return gather_bias(bias, nearest_tokens(positions, self.grid(resolution)[1], state.num_prefix_tokens))

    def place_tokens(self, hidden_states: Tensor, resolution: Any, state: TokenState) -> None:
        """Say where the tokens of the first layer lie."""
        if self.merge_index == 0:
            places = grid_places(*self.grid(resolution), state.num_prefix_tokens, hidden_states.device)
            state.place(places.expand(hidden_states.shape[0], -1, -1))

    def grid(self: Any, resolution: Any) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = resolution
        return height // self.patch_size, width // self.patch_size


class BeitLayerMerging(RelativeBiasMerging):
    """Merging between the attention and the MLP of a `BeitLayer`."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        resolution: tuple[int, int] | None = None,
        token_state: TokenState | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if token_state is None:
            return super().forward(  # type: ignore[misc]
                hidden_states,
                attention_mask=attention_mask,
                interpolate_pos_encoding=interpolate_pos_encoding,
                resolution=resolution,
                **kwargs,
            )
        bias = self._bias(hidden_states, attention_mask, interpolate_pos_encoding, resolution, token_state)
        normed = self.layernorm_before(hidden_states)
        attended, inside = self.run_attention(self.attention, token_state, normed, attention_mask=bias, **kwargs)
        attended = self.drop_path(self.lambda_1 * self.dropout(attended)) + inside.rows(hidden_states)
        hidden_states = self.merge_step(attended, normed, token_state, bias, inside=inside)
        grown = self.dropout(self.run_mlp(self.layernorm_after(hidden_states), token_state))
        return self.drop_path(self.lambda_2 * grown) + hidden_states

    def _bias(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        interpolate: bool,
        resolution: Any,
        state: TokenState,
    ) -> Tensor | None:
        """Sizes, the layer's own relative bias, and the shared one, which the model hands on as its mask."""
        relative = attention_mask
        if self.relative_position_bias is not None:
            num_tokens = state.num_tokens if self.merge_index else hidden_states.shape[1]
            own = self.relative_position_bias(self.grid(resolution), interpolate, dim_size=num_tokens)
            relative = add_biases(relative, own)
        if relative is not None:
            self.place_tokens(hidden_states, resolution, state)
        if relative is None or not state.has_merged(self.merge_index):
            return self.attention_bias(hidden_states, relative, state)
        sizes = self.attention_bias(hidden_states, None, state)
        return add_biases(self.follow(relative, resolution, state), sizes)


class BeitFamily(Backbone):
    encoder_class = BeitModel
    models = {
        "AutoModel": (BeitModel,),
        "AutoModelForImageClassification": (BeitForImageClassification,),
        "AutoModelForSemanticSegmentation": (BeitForSemanticSegmentation,),
        "AutoBackbone": (BeitBackbone,),
    }
    dense = (BeitForSemanticSegmentation, BeitBackbone)
    composites = (BeitForSemanticSegmentation,)
    layer_merging = BeitLayerMerging
    open_attention = OpenAttention

    def layers(self, encoder: Any) -> Sequence[nn.Module]:
        return encoder.layers

    def num_prefix_tokens(self, encoder: nn.Module) -> int:
        return 1

    def attention(self, layer: Any) -> nn.Module:
        return layer.attention

    def key_linear(self, layer: Any) -> tuple[nn.Module, int]:
        return layer.attention.k_proj, layer.attention.num_attention_heads

    def query_linear(self, layer: Any) -> nn.Module:
        return layer.attention.q_proj

    def readers(self, model: nn.Module, encoder: Any) -> Iterator[tuple[nn.Module, type]]:
        if encoder.pooler is not None:
            yield encoder.pooler, WeighedMean
