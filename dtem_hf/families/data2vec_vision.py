"""Data2Vec-Vision: BEiT in transformers' older code, in which attention makes its own relative position bias."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers.models.data2vec.modeling_data2vec_vision import (
    Data2VecVisionForImageClassification,
    Data2VecVisionForSemanticSegmentation,
    Data2VecVisionModel,
)

from ..scope import current_state
from ..token_state import TokenState
from .family import Family
from .older_vit import OLDER_VIT_LAYER
from .readers import WeighedMean
from .relative_bias import RelativeBiasMerging, add_biases, gather_bias


class FollowingBias:
    """A layer's relative position bias: [1, H, N, N] before a merge, [B, H, n, n] behind one."""

    def forward(self, window_size: Any, interpolate_pos_encoding: bool = False, dim_size: Any = None) -> Tensor:
        state = current_state()
        if state is None:
            return super().forward(window_size, interpolate_pos_encoding, dim_size)  # type: ignore[misc]
        dim_size = state.num_tokens if state.layer else dim_size
        bias = super().forward(window_size, interpolate_pos_encoding, dim_size)  # type: ignore[misc]
        return gather_bias(bias, state, state.layer, window_size[1])


class SharedBias:
    """The encoder's relative position bias. The model makes it in front of every layer, for all input tokens."""

    def forward(self, window_size: Any, interpolate_pos_encoding: bool = False, dim_size: Any = None) -> Tensor:
        state = current_state()
        if state is not None and state.num_layers:
            dim_size = state.num_tokens
        return super().forward(window_size, interpolate_pos_encoding, dim_size)  # type: ignore[misc]


class Data2VecVisionMerging(RelativeBiasMerging):
    """A `Data2VecVisionLayer` returns a tuple, and its MLP has two parts."""

    def merged_forward(  # type: ignore[override]
        self: Any,
        hidden_states: Tensor,
        state: TokenState,
        output_attentions: bool = False,
        relative_position_bias: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        resolution: Any = None,
    ) -> tuple[Tensor, ...]:
        parts = state.anatomy
        place = {"interpolate_pos_encoding": interpolate_pos_encoding, "resolution": resolution}
        patch_size = self.attention.attention.config.patch_size
        grid = resolution[0] // patch_size, resolution[1] // patch_size
        self.place_tokens(hidden_states, grid, state)
        bias = self.bias_with_sizes(hidden_states, relative_position_bias, state, grid)
        normed = getattr(self, parts.norm1)(hidden_states)
        attention = getattr(self, parts.attention)
        attended, *weights = attention(normed, output_attentions, relative_position_bias=bias, **place)
        hidden_states = self.drop_path(_scaled(attended, self.lambda_1)) + hidden_states
        own = attention.attention
        if own.has_relative_position_bias and not state.method.pairwise:  # the method ranks by attention scores
            bias = add_biases(own.relative_position_bias(grid, interpolate_pos_encoding), bias)
        if not state.method.between:
            hidden_states = state.method.reduce(hidden_states, normed, self, state, bias)
        grown = getattr(self, parts.mlp)(self.intermediate(getattr(self, parts.norm2)(hidden_states)))
        hidden_states = self.drop_path(_scaled(grown, self.lambda_2)) + hidden_states
        if state.method.between:
            hidden_states = state.method.reduce(hidden_states, normed, self, state, bias)
        return (hidden_states, *weights)


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else scale * x


FAMILY = Family(
    encoders={Data2VecVisionModel: "encoder.layer"},
    anatomy=replace(OLDER_VIT_LAYER, mlp="output"),
    models={
        Data2VecVisionModel: "tokens",
        Data2VecVisionForImageClassification: "tokens",
        Data2VecVisionForSemanticSegmentation: "grid",
    },
    composites=(Data2VecVisionForSemanticSegmentation,),
    encoder_parts={"pooler": WeighedMean, "encoder.relative_position_bias": SharedBias},
    layer_parts={"attention.attention.relative_position_bias": FollowingBias},
    layer_merging=Data2VecVisionMerging,
)
