"""Data2Vec-Vision: BEiT in an older build of transformers, whose attention makes its own relative position bias."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from transformers.models.data2vec.modeling_data2vec_vision import (
    Data2VecVisionForImageClassification,
    Data2VecVisionForSemanticSegmentation,
    Data2VecVisionModel,
)

from ..scope import current_layer, current_state, open_layer
from ..token_state import TokenState
from .base import Backbone
from .beit import RelativeBiasMerging, add_biases, gather_bias, nearest_tokens
from .readers import WeighedMean


class FollowingBias:
    """A layer's relative position bias: [1, H, N, N] before a merge, [B, H, n, n] behind one."""

    def forward(self, window_size: Any, interpolate_pos_encoding: bool = False, dim_size: Any = None) -> Tensor:
        layer = current_layer()
        if layer is None:
            return super().forward(window_size, interpolate_pos_encoding, dim_size)  # type: ignore[misc]
        state, index = layer
        dim_size = state.num_tokens if index else dim_size
        bias = super().forward(window_size, interpolate_pos_encoding, dim_size)  # type: ignore[misc]
        positions = state.positions(index)
        if not state.has_merged(index) or positions is None:
            return bias
        return gather_bias(bias, nearest_tokens(positions, window_size[1], state.num_prefix_tokens))


class SharedBias:
    """The encoder's relative position bias, made anew in front of every layer, always for the tokens as they came."""

    def forward(self, window_size: Any, interpolate_pos_encoding: bool = False, dim_size: Any = None) -> Tensor:
        state = current_state()
        if state is not None and state.num_layers:
            dim_size = state.num_tokens
        return super().forward(window_size, interpolate_pos_encoding, dim_size)  # type: ignore[misc]


class Data2VecVisionLayerMerging(RelativeBiasMerging):
    """Merging between the attention and the MLP of a `Data2VecVisionLayer`."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        output_attentions: bool = False,
        relative_position_bias: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        resolution: tuple[int, int] | None = None,
        token_state: TokenState | None = None,
    ) -> tuple[Tensor, ...]:
        place = {"interpolate_pos_encoding": interpolate_pos_encoding, "resolution": resolution}
        if token_state is None:
            return super().forward(  # type: ignore[misc]
                hidden_states, output_attentions, relative_position_bias=relative_position_bias, **place
            )
        self.place_tokens(hidden_states, resolution, token_state)
        sizes = self.attention_bias(hidden_states, None, token_state)
        shared = relative_position_bias
        if shared is not None:
            shared = self.follow(shared, resolution, token_state)
        bias = add_biases(shared, sizes)
        normed = self.layernorm_before(hidden_states)
        with open_layer(token_state, self.merge_index):
            attended, *weights = self.attention(normed, output_attentions, relative_position_bias=bias, **place)
        attended = attended if self.lambda_1 is None else self.lambda_1 * attended
        hidden_states = self.merge_step(
            self.drop_path(attended) + hidden_states,
            normed,
            token_state,
            lambda: self._whole_bias(bias, place, token_state),
        )
        grown = self.output(self.intermediate(self.layernorm_after(hidden_states)))
        grown = grown if self.lambda_2 is None else self.lambda_2 * grown
        return (self.drop_path(grown) + hidden_states, *weights)

    def _whole_bias(self: Any, bias: Tensor | None, place: dict[str, Any], state: TokenState) -> Tensor | None:
        """With the bias that the attention makes itself."""
        attention = self.attention.attention
        if not attention.has_relative_position_bias:
            return bias
        with open_layer(state, self.merge_index):
            own = attention.relative_position_bias(self.grid(place["resolution"]), place["interpolate_pos_encoding"])
        return add_biases(own, bias)

    def grid(self: Any, resolution: Any) -> tuple[int, int]:
        patch_size = self.attention.attention.config.patch_size
        return resolution[0] // patch_size, resolution[1] // patch_size


class Data2VecVisionFamily(Backbone):
    encoder_class = Data2VecVisionModel
    models = {
        "AutoModel": (Data2VecVisionModel,),
        "AutoModelForImageClassification": (Data2VecVisionForImageClassification,),
        "AutoModelForSemanticSegmentation": (Data2VecVisionForSemanticSegmentation,),
    }
    dense = (Data2VecVisionForSemanticSegmentation,)
    composites = (Data2VecVisionForSemanticSegmentation,)
    layer_merging = Data2VecVisionLayerMerging

    def layers(self, encoder: Any) -> Sequence[nn.Module]:
        return encoder.encoder.layer

    def num_prefix_tokens(self, encoder: nn.Module) -> int:
        return 1

    def attention(self, layer: Any) -> nn.Module:
        return layer.attention

    def key_linear(self, layer: Any) -> tuple[nn.Module, int]:
        return layer.attention.attention.key, layer.attention.attention.num_attention_heads

    def query_linear(self, layer: Any) -> nn.Module:
        return layer.attention.attention.query

    def readers(self, model: nn.Module, encoder: Any) -> Iterator[tuple[nn.Module, type]]:
        if encoder.pooler is not None:
            yield encoder.pooler, WeighedMean
        if encoder.encoder.has_relative_position_bias:
            yield encoder.encoder.relative_position_bias, SharedBias
        for layer in encoder.encoder.layer:
            if layer.attention.attention.has_relative_position_bias:
                yield layer.attention.attention.relative_position_bias, FollowingBias
