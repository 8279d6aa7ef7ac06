"""What a reduction method is: the step between a layer's attention and its MLP."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from torch import Tensor

from ..configuration import MergeConfig
from ..costs import MetricCost
from ..embedding import DecoupledEmbedding, EmbeddingShape, Geometry, KeyProjection
from ..token_state import TokenState


C = TypeVar("C", bound=MergeConfig)


class MergedLayer(Protocol):
    """What a method may ask of the layer that runs."""

    training: bool

    def keys(self, normed: Tensor, state: TokenState) -> Tensor:
        """Attention keys as the layer computes them, before any rotation: [B, n, D] -> [B, n, H, d]."""

    def first_token_attention(self, normed: Tensor, bias: Tensor | None, state: TokenState) -> Tensor:
        """How much the first token attends to each token, averaged over heads: [B, n, D] -> [B, n], float32."""


_METHODS: dict[str, type[Method[Any]]] = {}


class Method(ABC, Generic[C]):
    """One method, set up for one encoder. Holds no tensors and nothing about a pass.

    A subclass names its `config_class`. `pairwise`: each token that leaves a layer is one of a pair, so that
    at most half of the tokens can leave. `merges_halves`: those are the tokens at even and at odd positions.
    `between`: `reduce` runs behind a layer's MLP, in front of the next layer, not between attention and MLP.
    """

    config_class: ClassVar[type[MergeConfig]]
    pairwise: ClassVar[bool] = True
    merges_halves: ClassVar[bool] = False
    between: ClassVar[bool] = False

    def __init__(self, config: C, geometry: Geometry) -> None:
        self.config = config
        self.geometry = geometry

    def __init_subclass__(cls) -> None:
        if "config_class" in cls.__dict__:
            _METHODS[cls.config_class.method] = cls

    def check(self, encoder_name: str) -> None:
        """Raise UnsupportedModelError for an encoder that lacks what the method needs."""

    def embedding_shape(self) -> EmbeddingShape | None:
        """What this method learns of an encoder, None if it learns nothing."""
        return None

    def initialize(self, embedding: DecoupledEmbedding, keys: Sequence[KeyProjection], std: float) -> None:
        """Fill the learned embedding from the layers' key projections; `std` is that of the backbone's own weights."""

    @abstractmethod
    def metric_cost(self) -> MetricCost:
        """Multiply-adds of the features that a layer compares tokens by."""

    @abstractmethod
    def reduce(self, x: Tensor, normed: Tensor, layer: MergedLayer, state: TokenState, bias: Tensor | None) -> Tensor:
        """Reduce the tokens of layer `state.layer`, behind its attention: x [B, n, D] -> [B, n', D].

        `normed` [B, n, D] is the input of the layer's queries, keys and values, `bias` [B or 1, 1 or H, 1 or n, n] the
        mask that was added to its scores.
        """

    def wants_bias(self, training: bool) -> bool:
        """Whether attention weighs tokens by their sizes."""
        return self.config.proportional_attention

    def masks_tokens(self, training: bool) -> bool:
        """Whether tokens that leave stay, behind a mask, until the encoder returns all in place."""
        return False

    def loss_term(self, state: TokenState) -> Tensor | None:
        """What a training pass adds to the loss of a task: a scalar, or None for nothing."""
        return None

    def sizes_carry_gradient(self, training: bool) -> bool:
        """Whether gradients flow from one layer to the next through token sizes."""
        return False


def make_method(config: MergeConfig, geometry: Geometry) -> Method[Any]:
    """The method that a config names."""
    return _METHODS[config.method](config, geometry)
