"""The base class of reduction methods: the step between a layer's attention and its MLP."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from ..configuration import MergeConfig
from ..costs import MetricCost
from ..embedding import DecoupledEmbedding, EmbeddingShape, Geometry, KeyProjection
from ..token_state import TokenState


_METHODS: dict[str, type[Method]] = {}


class Method(ABC):
    """A reduction method for one encoder. It holds no tensors and no state of a pass.

    A subclass names its `config_class`. `pairwise`: tokens merge in pairs, so that at most half of them can leave a
    layer. `merges_halves`: the pairs are of even and odd positions (A and B). `between`: `reduce` runs behind the
    layer's MLP, in front of the next layer, and not between attention and MLP.
    """

    config_class: ClassVar[type[MergeConfig]]
    pairwise: ClassVar[bool] = True
    merges_halves: ClassVar[bool] = False
    between: ClassVar[bool] = False

    def __init__(self, config: Any, geometry: Geometry) -> None:
        self.config = config
        self.geometry = geometry

    def __init_subclass__(cls) -> None:
        if "config_class" in cls.__dict__:
            _METHODS[cls.config_class.method] = cls

    def check(self, encoder_name: str) -> None:  # noqa: B027 (most methods run in every encoder)
        """Raise UnsupportedModelError if the method cannot run in the encoder."""

    def embedding_shape(self) -> EmbeddingShape | None:
        """The shapes of the method's learned parameters; None if it learns nothing."""
        return None

    def initialize(  # noqa: B027 (most methods learn nothing)
        self, embedding: DecoupledEmbedding, keys: Sequence[KeyProjection], std: float
    ) -> None:
        """Fill the untrained embedding, from key projections or with standard deviation `std`, the backbone's own."""

    @abstractmethod
    def metric_cost(self) -> MetricCost:
        """Multiply-adds of a layer's metric, and of comparing tokens by it."""

    @abstractmethod
    def reduce(self, x: Tensor, normed: Tensor, layer: Any, state: TokenState, bias: Tensor | None) -> Tensor:
        """Reduce the tokens of layer `state.layer` and record it in `state`: x [B, n, D] -> [B, n', D].

        `normed` [B, n, D] is the input of the layer's queries, keys and values. `bias` [B or 1, 1 or H, 1 or n, n] is
        the mask that attention added to its scores. `layer` is a `LayerMerging` (`families/layer.py`).
        """

    def wants_bias(self, training: bool) -> bool:
        """Whether attention weighs tokens by their sizes."""
        return self.config.proportional_attention

    def masks_tokens(self, training: bool) -> bool:
        """Whether pruned tokens stay in the sequence behind a mask, until the encoder returns all tokens in place."""
        return False

    def loss_term(self, state: TokenState) -> Tensor | None:
        """A scalar that training adds to the task's loss; None for nothing."""
        return None

    def sizes_carry_gradient(self, training: bool) -> bool:
        """Whether gradients flow from one layer to the next through token sizes."""
        return False


def make_method(config: MergeConfig, geometry: Geometry) -> Method:
    """The method that a config names."""
    return _METHODS[config.method](config, geometry)
