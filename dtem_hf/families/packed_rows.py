"""Encoders that pack the patches of all images into rows, without a batch: the vision towers of Qwen's models.

A segment, an image or a frame of a video, attends only to itself. All segments of the same length form a batch
[S, N, D] with its own token state, so an image merges in the same way alone and among others. A layer takes and
returns all rows [T, D], in place: it reads one row for each merged token, and writes every token to all of its rows.
So modules that read rows between or behind the layers need no change. Rotations are those of DINOv3.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.dinov3_vit.modeling_dinov3_vit import apply_rotary_pos_emb

from .. import ops
from ..costs import EncoderCost, MetricCost
from ..errors import UnsupportedModelError
from ..scope import Scope, open_scope
from ..token_state import TokenState
from .dinov3_vit import DINOv3ViTFamily, coordinates, rotation_at
from .layer import LayerMerging
from .masked_attention import attend


def rows_by_length(cu_seqlens: Tensor) -> list[Tensor]:
    """The rows [S, N] of all segments, for each length N; `cu_seqlens` are the starts of segments and the last end."""
    starts: dict[int, list[int]] = {}
    for start, end in pairwise(cu_seqlens.tolist()):
        starts.setdefault(end - start, []).append(start)
    device = cu_seqlens.device
    return [
        torch.tensor(first, device=device).unsqueeze(1) + torch.arange(length, device=device)
        for length, first in starts.items()
    ]


def first_rows(rows: Tensor, state: TokenState, layer: int) -> Tensor:
    """The first row of every token that enters a layer: rows of all patches [S, N] -> [S, n]."""
    sizes = state.sizes(layer)
    if sizes is None:
        return rows
    source = state.source(layer - 1).to(rows.device)
    return rows.new_full(sizes.shape, torch.iinfo(rows.dtype).max).scatter_reduce(1, source, rows, "amin")


class PackedRowsMerging(LayerMerging):
    """A layer on all rows [T, D]. Until a layer merges, the model's own forward pass runs."""

    def merged_forward(
        self: Any, hidden_states: Tensor, state: TokenState, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        index, device = self.merge_index, hidden_states.device
        if state.method.masks_tokens(self.training):
            raise UnsupportedModelError(
                f"{type(self).__name__}: rows cannot hold pruned tokens, which dTPS needs in training."
            )
        if not state.parts:
            state.divide(rows_by_length(kwargs["cu_seqlens"]))
            places = coordinates(kwargs["position_embeddings"], self.theta(state))
            places = (places * 2 * math.pi).round() / (2 * math.pi)  # exact: rows and columns are whole numbers
            for rows, part in state.parts:
                part.place(places[rows])
        if not any(
            part.has_merged(index) or part.begin_layer(index, rows.shape[1])[1] > 0 for rows, part in state.parts
        ):
            for rows, part in state.parts:
                part.record_unchanged(index, rows)
            return super().forward(hidden_states, **kwargs)
        returned = []
        for rows, part in state.parts:
            taken = first_rows(rows.to(device), part, index)
            tokens = hidden_states.index_select(0, taken.flatten()).unflatten(0, taken.shape)  # [S, n, D]
            part.layer = index
            with open_scope(Scope(state=part, closed=True)):
                tokens = super().merged_forward(tokens, part, **kwargs)
            returned.append(ops.unmerge_tokens(tokens, part.source(index).to(device)).flatten(0, 1))
        if len(returned) == 1:
            return returned[0]
        places, whole = torch.cat([rows.flatten() for rows, _ in state.parts]), torch.cat(returned)
        return torch.empty_like(whole).index_copy_(0, places.to(device), whole)

    def theta(self, state: TokenState) -> float:
        """The base of the layer's rotations."""
        return attrgetter(state.anatomy.attention)(self).config.rope_parameters["rope_theta"]

    def attention_inputs(
        self, hidden_states: Tensor, attention_mask: Tensor | None, state: TokenState, kwargs: dict[str, Any]
    ) -> Tensor | None:
        state.move_to(self.merge_index, hidden_states.device)
        positions, head_dim = state.positions(self.merge_index), kwargs["position_embeddings"][0].shape[-1]
        assert positions is not None
        kwargs["position_embeddings"] = rotation_at(positions, self.theta(state), head_dim, torch.float32)
        return super().attention_inputs(hidden_states, attention_mask, state, kwargs)


class PackedRowsAttention:
    """Mixin for an attention over rows with one projection `qkv`: it also takes batches [S, n, D] and a mask."""

    def forward(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        if hidden_states.dim() == 2:
            return super().forward(hidden_states, **kwargs)  # type: ignore[misc]
        # [S, n, 3 · H · d] -> 3 × [S, H, n, d]
        q, k, v = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        turned = apply_rotary_pos_emb(q.float(), k.float(), *kwargs["position_embeddings"])
        q, k = (x.to(v.dtype) for x in turned)
        return self.proj(attend(self, q, k, v, attention_mask, self.scaling, self.attention_dropout)[0])


class PackedRowsFamily(DINOv3ViTFamily):
    """Images of any size. A module behind the layers joins square groups of patches."""

    def input_sides(self, config: Any) -> tuple[int, ...]:
        """The default size of plans: 32 by 32 patches, or as many as there are learned positions."""
        patches = math.isqrt(getattr(config, "num_position_embeddings", 32 * 32))
        return tuple(patches * side for side in self.patch_sides(config))

    def num_tokens(self, encoder: Any, image_size: Any = None) -> int:
        """Tokens of an image or a frame of a video; sides are rounded to whole squares, as the processor does."""
        squares, sides = encoder.spatial_merge_size, self.input_shape(encoder, image_size)[-2:]
        patches = zip(sides, self.patch_sides(encoder.config), strict=True)
        return math.prod(max(round(side / (patch * squares)), 1) * squares for side, patch in patches)

    def encoder_cost(self, model: nn.Module, encoder: Any, metric: MetricCost) -> EncoderCost:
        cost = super().encoder_cost(model, encoder, metric)
        return replace(cost, stem=cost.stem + cost.head // encoder.spatial_merge_size**2, head=0)
