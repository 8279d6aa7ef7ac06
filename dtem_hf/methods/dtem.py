"""DTEM: tokens are compared by a learned embedding, decoupled from the backbone (METHOD.md sections 2 to 4)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from .. import ops
from ..configuration import DTEMConfig
from ..embedding import (
    DecoupledEmbedding,
    EmbeddingShape,
    default_embed_dim,
    initialize_from_keys,
    initialize_randomly,
    norms_of,
)
from ..schedule import MetricCost
from ..token_state import TokenState
from .base import AttentionInputs, MetricSource
from .matching import MatchingReducer, leave_matched, lengthen


class DTEMReducer(MatchingReducer[DTEMConfig]):
    """Soft grouping and soft merging in `.train()`, hard matching in `.eval()`, unless the config says otherwise."""

    config_class: ClassVar[type[DTEMConfig]] = DTEMConfig

    def embedding_shape(self, encoder: nn.Module) -> EmbeddingShape:
        layers = self.backbone.layers(encoder)
        keys = self.backbone.key_projection(layers[0])
        hidden_size = keys.weight.shape[1]
        embed_dim = self.config.embed_dim or default_embed_dim(hidden_size, keys.head_dim)
        heads = keys.num_heads if self.config.learn_exponents else 0
        c = self.config
        return EmbeddingShape(len(layers), hidden_size, embed_dim, heads, c.learn_norms)

    def initialize(self, embedding: DecoupledEmbedding, encoder: nn.Module) -> None:
        if self.config.init == "random":
            initialize_randomly(embedding, std=getattr(encoder.config, "initializer_range", 0.02))
        else:
            initialize_from_keys(embedding, [self.backbone.key_projection(x) for x in self.backbone.layers(encoder)])

    def metric_cost(self, encoder: nn.Module, layer: nn.Module) -> MetricCost:
        shape = self.embedding_shape(encoder)
        return MetricCost(shape.hidden_size * shape.embed_dim, width=shape.embed_dim)

    def is_soft(self, layer: nn.Module) -> bool:
        """Whether a layer merges softly at this moment."""
        return self.config.relaxation == "soft" or (self.config.relaxation == "auto" and layer.training)

    def is_straight_through(self, layer: nn.Module) -> bool:
        """Whether a layer merges hard, with the gradients of the soft merge, at this moment."""
        return self.config.relaxation == "straight_through" and layer.training

    def wants_bias(self, layer: nn.Module) -> bool:
        # Softly merged tokens leave attention only through their sizes.
        return self.config.proportional_attention or self.is_soft(layer)

    def sizes_carry_gradient(self, layer: nn.Module) -> bool:
        return self.is_soft(layer) or self.is_straight_through(layer)

    def metric_source(self, layer: nn.Module, index: int, state: TokenState) -> MetricSource | None:
        if state.steps is not None or self.is_soft(layer) or self.is_straight_through(layer):
            return None
        assert state.embedding is not None
        return MetricSource(state.embedding.layers[index])

    def metric(
        self, normed: Tensor, layer: nn.Module, index: int, state: TokenState, attention: AttentionInputs
    ) -> tuple[Tensor, int]:
        assert state.embedding is not None
        # Detached, so that the backbone is never taught to be easy to compare.
        return state.embedding.layers[index](normed.detach()), 1

    def merge(
        self, x: Tensor, metric: Tensor, heads: int, r: int, layer: nn.Module, index: int, state: TokenState
    ) -> Tensor:
        if self.is_straight_through(layer):
            return self._merge_straight_through(x, metric, r, index, state)
        if not self.is_soft(layer):
            return super().merge(x, metric, heads, r, layer, index, state)
        active, _ = state.enter(index, x.shape[1])
        sizes = state.sizes(index)
        if sizes is None:
            sizes = torch.ones(x.shape[:2], dtype=torch.float32, device=x.device)
        before, prefix = sizes, state.num_prefix_tokens
        assignment = ops.soft_assignment(
            metric,
            active,
            r,
            prefix,
            self.config.top_k,
            self.config.score_temperature,
            self.config.assignment_temperature,
            state.padding(index),
        )
        unmerged = x
        x, sizes = ops.move_mass(x, before, assignment, active, prefix)
        x = lengthen(
            state,
            index,
            x,
            lambda: ops.move_mass(norms_of(unmerged), before, assignment, active, prefix)[0],
        )
        order = ops.size_order(sizes, active, prefix)
        x, sizes = ops.permute_tokens(x, order), ops.permute_tokens(sizes, order)

        def carry(positions: Tensor) -> Tensor:
            return ops.permute_tokens(ops.move_mass(positions, before, assignment, active, prefix)[0], order)

        state.leave(index, x, sizes, active - r, source=lambda: order.argsort(dim=-1), carry=carry)
        return x

    def _merge_straight_through(self, x: Tensor, metric: Tensor, r: int, index: int, state: TokenState) -> Tensor:
        c, num_tokens, before = self.config, x.shape[1], state.sizes(index)
        matching, flow = ops.straight_through_matching(
            metric,
            r,
            state.num_prefix_tokens,
            c.top_k,
            c.score_temperature,
            c.assignment_temperature,
            state.padding(index),
        )
        unmerged = x
        x, sizes = ops.merge_along_flow(x, before, matching, flow)
        x = lengthen(state, index, x, lambda: ops.merge_along_flow(norms_of(unmerged), before, matching, flow)[0])
        leave_matched(state, index, ops.Merged(x, sizes, lambda: matching), num_tokens)
        return x
