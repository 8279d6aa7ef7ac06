"""DTEM: tokens are compared by a learned embedding, decoupled from the backbone (docs/method.md sections 2 to 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..configuration import DTEMConfig
from ..costs import MetricCost
from ..embedding import (
    DecoupledEmbedding,
    EmbeddingShape,
    KeyProjection,
    default_embed_dim,
    initialize_from_keys,
    initialize_randomly,
)
from ..token_state import TokenState
from .matching import MatchingMethod, record_matched


class DTEM(MatchingMethod):
    """Soft grouping and soft merging in `.train()`, hard matching in `.eval()`, unless the config says otherwise."""

    config_class = DTEMConfig

    def embedding_shape(self) -> EmbeddingShape:
        g, c = self.geometry, self.config
        heads = g.num_heads if c.learn_exponents else 0
        width, shifts = c.embed_dim or default_embed_dim(g), g.shiftable if c.learn_shifts else ()
        return EmbeddingShape(g.num_layers, g.hidden_size, width, heads, c.learn_norms, shifts=shifts)

    def initialize(self, embedding: DecoupledEmbedding, keys: Sequence[KeyProjection], std: float) -> None:
        if self.config.init == "random":
            initialize_randomly(embedding, std)
        else:
            initialize_from_keys(embedding, keys)

    def metric_cost(self) -> MetricCost:
        shape = self.embedding_shape()
        return MetricCost(shape.hidden_size * shape.embed_dim, width=shape.embed_dim)

    def is_soft(self, training: bool) -> bool:
        """Whether a layer in this mode merges softly."""
        return self.config.relaxation == "soft" or (self.config.relaxation == "auto" and training)

    def is_straight_through(self, training: bool) -> bool:
        """Whether a layer in this mode merges hard, with the gradients of the soft merge."""
        return self.config.relaxation == "straight_through" and training

    def wants_bias(self, training: bool) -> bool:
        # Softly merged tokens stay in the sequence; only their small sizes take them out of attention.
        return self.config.proportional_attention or self.is_soft(training)

    def sizes_carry_gradient(self, training: bool) -> bool:
        return self.is_soft(training) or self.is_straight_through(training)

    def metric(self, normed: Tensor, layer: Any, state: TokenState) -> Tensor:
        assert state.embedding is not None
        # Detached: the metric's gradient must not change the backbone.
        return state.embedding.projections[state.layer](normed.detach())

    def merge(self, x: Tensor, metric: Tensor, r: int, training: bool, state: TokenState) -> Tensor:
        if self.is_straight_through(training):
            return self._merge_straight_through(x, metric, r, state)
        if not self.is_soft(training):
            return super().merge(x, metric, r, training, state)
        return self._merge_softly(x, metric, r, state)

    @property
    def _relaxation(self) -> dict[str, Any]:
        names = ("top_k", "score_temperature", "assignment_temperature")
        return {name: getattr(self.config, name) for name in names}

    def _merge_softly(self, x: Tensor, metric: Tensor, r: int, state: TokenState) -> Tensor:
        index, prefix = state.layer, state.num_prefix_tokens
        active, _ = state.begin_layer(index, x.shape[1])
        before = state.sizes(index)
        if before is None:
            before = torch.ones(x.shape[:2], dtype=torch.float32, device=x.device)
        assignment = ops.soft_assignment(metric, active, r, prefix, empty=state.padding(index), **self._relaxation)
        merged, sizes = ops.move_mass(x, before, assignment, active, prefix)
        assert state.embedding is not None
        merged = state.embedding.lengthen(
            index, merged, lambda: ops.move_mass(ops.norms_of(x), before, assignment, active, prefix)[0]
        )
        order = ops.size_order(sizes, active, prefix)
        merged, sizes = ops.permute_tokens(merged, order), ops.permute_tokens(sizes, order)

        def carry(positions: Tensor) -> Tensor:
            return ops.permute_tokens(ops.move_mass(positions, before, assignment, active, prefix)[0], order)

        state.record_merge(index, merged, sizes, active - r, source=lambda: order.argsort(dim=-1), carry=carry)
        return merged

    def _merge_straight_through(self, x: Tensor, metric: Tensor, r: int, state: TokenState) -> Tensor:
        index, before, prefix = state.layer, state.sizes(state.layer), state.num_prefix_tokens
        matching, flow = ops.straight_through_matching(
            metric, r, prefix, empty=state.padding(index), **self._relaxation
        )
        merged, sizes = ops.merge_along_flow(x, before, matching, flow, prefix)
        assert state.embedding is not None
        merged = state.embedding.lengthen(
            index, merged, lambda: ops.merge_along_flow(ops.norms_of(x), before, matching, flow, prefix)[0]
        )
        record_matched(state, merged, sizes, matching)
        return merged
