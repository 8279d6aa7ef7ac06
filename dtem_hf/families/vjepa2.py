"""V-JEPA 2: clips; no prefix token; rotary positions (frame, row, column); a predictor, and a pooler that attends.

The position of a merged token is the size-weighted mean of its patches' positions. The predictor needs all tokens in
place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.vjepa2.modeling_vjepa2 import (
    VJEPA2Encoder,
    VJEPA2ForVideoClassification,
    VJEPA2Model,
    VJEPA2PoolerCrossAttention,
    VJEPA2PoolerCrossAttentionLayer,
    VJEPA2PoolerSelfAttention,
    VJEPA2PoolerSelfAttentionLayer,
)

from ..scope import current_state
from ..token_state import TokenState
from .dinov2 import DINOV3_LAYER
from .family import Family
from .layer import LayerMerging
from .masked_attention import attend, by_heads
from .readers import GridReader, RecordingGridReader, read_bias


class PlacedAttention:
    """Mixin for the encoder's attention, which takes no mask: merged tokens have positions, and count by size."""

    def get_position_ids(self, x: Tensor, masks: Tensor | None = None) -> tuple[Tensor, ...]:
        """Frame, row and column of tokens [B, n, D]: three of [n], or of [B, 1, n] behind a merge."""
        state = current_state()
        positions = None if state is None else state.positions(state.layer)
        if state is None or positions is None or not state.has_merged(state.layer):
            return super().get_position_ids(x, masks)  # type: ignore[misc]
        return positions.to(x.dtype).unsqueeze(1).unbind(-1)

    def forward(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        if attention_mask is None:
            return super().forward(hidden_states)  # type: ignore[misc]
        q, k, v = by_heads(hidden_states, self.num_attention_heads, self.query, self.key, self.value)
        places = self.get_position_ids(hidden_states)
        q, k = (self.apply_rotary_embeddings(x, places) for x in (q, k))
        mixed, weights = attend(self, q, k, v, attention_mask, self.scaling, self.dropout_prob)
        return self.proj(mixed), weights


class VJEPA2Merging(LayerMerging):
    """A `VJEPA2Layer` returns a tuple."""

    def merged_forward(self, hidden_states: Tensor, state: TokenState, *args: Any, **kwargs: Any) -> Any:
        return super().merged_forward(hidden_states, state, *args, **kwargs), None

    def attention_inputs(
        self: Any, hidden_states: Tensor, attention_mask: Tensor | None, state: TokenState, kwargs: dict[str, Any]
    ) -> Tensor | None:
        if self.merge_index == 0:
            places = torch.stack(self.attention.get_position_ids(hidden_states), dim=-1).float()
            state.place(places.expand(hidden_states.shape[0], -1, -1))
        return super().attention_inputs(hidden_states, attention_mask, state, kwargs)


class WeighedPooling:
    """Mixin for a layer of the pooler: a token of size m counts m times."""

    def __call__(self, *tokens: Tensor, **kwargs: Any) -> Any:
        # Pass the mask as an argument: gradient checkpointing runs the forward pass again outside of every scope.
        if (bias := read_bias(tokens[-1], tokens[-1].dtype)) is not None:
            kwargs["attention_mask"] = bias
        return super().__call__(*tokens, **kwargs)  # type: ignore[misc]


class MaskedPooling:
    """Mixin for an attention of the pooler, whose "eager" form takes no mask."""

    def forward(self: Any, *tokens: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        if attention_mask is None:
            return super().forward(*tokens, **kwargs)  # type: ignore[misc]
        queries, keys = tokens[:2] if tokens else [kwargs["hidden_states"]] * 2
        (q,) = by_heads(queries, self.num_heads, self.q_proj)
        k, v = by_heads(keys, self.num_heads, self.k_proj, self.v_proj)
        mixed, weights = attend(self, q, k, v, attention_mask, self.scale, self.dropout)
        return (self.out_proj(mixed) if hasattr(self, "out_proj") else mixed), weights


class VJEPA2Family(Family):
    """The model records hidden states itself; its pooler has any number of layers."""

    def model_mixins(self, model_class: type) -> tuple[type, ...]:
        mixins = super().model_mixins(model_class)
        return tuple(RecordingGridReader if mixin is GridReader else mixin for mixin in mixins)

    def parts(self, model: nn.Module, encoder: nn.Module) -> Iterator[tuple[nn.Module, type]]:
        yield from super().parts(model, encoder)
        for module in model.modules():
            if isinstance(module, (VJEPA2PoolerSelfAttentionLayer, VJEPA2PoolerCrossAttentionLayer)):
                yield module, WeighedPooling
            elif isinstance(module, (VJEPA2PoolerSelfAttention, VJEPA2PoolerCrossAttention)):
                yield module, MaskedPooling


FAMILY = VJEPA2Family(
    encoders={VJEPA2Encoder: "layer"},
    anatomy=replace(
        DINOV3_LAYER,
        query="attention.query",
        key="attention.key",
        heads="attention.num_attention_heads",
        branch1=("drop_path",),
        branch2=("drop_path",),
    ),
    models={VJEPA2Model: "grid", VJEPA2ForVideoClassification: "weighed"},
    num_prefix_tokens=0,
    input_fields=("frames_per_clip", "crop_size"),
    patch_fields=("tubelet_size", "patch_size"),
    composites=(VJEPA2Model, VJEPA2ForVideoClassification),
    layer_parts={"attention": PlacedAttention},
    layer_merging=VJEPA2Merging,
)
