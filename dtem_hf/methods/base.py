"""What a reduction method is: the step between a layer's attention and its MLP."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeVar

from torch import Tensor, nn

from ..configuration import MergeConfig
from ..embedding import DecoupledEmbedding, EmbeddingShape
from ..schedule import EncoderCost, MetricCost
from ..token_state import TokenState


if TYPE_CHECKING:
    from ..families.base import Backbone


C = TypeVar("C", bound=MergeConfig)


class AttentionInputs(NamedTuple):
    """What a layer's scores depend on beside its projections.

    `bias` [B or 1, 1 or H, 1 or n, n] is added to them, and may be a function that makes it; `rotate` maps keys
    [B, H, n, d] to rotated ones. `keys` [B, n, H · d] are those that attention has computed, where it hands them out.
    """

    bias: Tensor | Callable[[], Tensor | None] | None = None
    rotate: Callable[[Tensor], Tensor] | None = None
    keys: Tensor | None = None


class MetricSource(NamedTuple):
    """What a layer that runs as one call compares its tokens by: a linear map of the normed tokens, or its keys."""

    linear: nn.Module | None


_REDUCERS: dict[str, type[Reducer[Any]]] = {}


class Reducer(ABC, Generic[C]):
    """One method, set up for one backbone. Holds no tensors and nothing about a pass."""

    config_class: ClassVar[type[MergeConfig]]
    # Whether each token that leaves a layer joins one that stays, and so at most half of them can leave.
    pairwise: ClassVar[bool] = True
    # Whether it has something to do in layers that merge nothing, too.
    runs_in_every_layer: ClassVar[bool] = True

    def __init__(self, config: C, backbone: Backbone) -> None:
        self.config = config
        self.backbone = backbone

    def __init_subclass__(cls) -> None:
        if "config_class" in cls.__dict__:
            _REDUCERS[cls.config_class.method] = cls
        # Who merges in another way than the class above says anew what of it may be part of one call.
        if not {"reduce", "merge", "metric"}.isdisjoint(vars(cls)) and "metric_source" not in vars(cls):
            cls.metric_source = Reducer.metric_source  # type: ignore[method-assign]
        if "reduce" in vars(cls) and "runs_in_every_layer" not in vars(cls):
            cls.runs_in_every_layer = True

    def check(self, encoder: nn.Module) -> None:
        """Raise UnsupportedModelError for an encoder that has not what the method needs."""

    def embedding_shape(self, encoder: nn.Module) -> EmbeddingShape | None:
        """What this method learns of an encoder, None if it learns nothing."""
        return None

    @abstractmethod
    def initialize(self, embedding: DecoupledEmbedding, encoder: nn.Module) -> None:
        """Fill the learned embedding for an encoder whose own weights are in place."""

    @abstractmethod
    def metric_cost(self, encoder: nn.Module, layer: nn.Module) -> MetricCost:
        """Multiply-adds of what tokens are compared by in a layer."""

    @abstractmethod
    def reduce(
        self, x: Tensor, normed: Tensor, layer: nn.Module, index: int, state: TokenState, attention: AttentionInputs
    ) -> Tensor:
        """Reduce the tokens of layer `index`, behind its attention: x [B, n, D] -> [B, n', D].

        `normed` [B, n, D] is what fed the layer's queries, keys and values, `attention` what else its scores saw.
        """

    def metric_source(self, layer: nn.Module, index: int, state: TokenState) -> MetricSource | None:
        """What a layer that runs as one call merges by; None where the merge has to run by itself."""
        return None

    def wants_bias(self, layer: nn.Module) -> bool:
        """Whether attention in a layer weighs tokens by their sizes."""
        return self.config.proportional_attention

    def sizes_carry_gradient(self, layer: nn.Module) -> bool:
        """Whether gradients flow from one layer to the next through token sizes."""
        return False

    def encoder_cost(self, model: nn.Module, encoder: nn.Module) -> EncoderCost:
        """Multiply-adds of a model with this reduction."""
        cost = self.backbone.encoder_cost(model, encoder, lambda layer: self.metric_cost(encoder, layer))
        return replace(cost, pairwise=self.pairwise)


def make_reducer(config: MergeConfig, backbone: Backbone) -> Reducer[Any]:
    """The reducer that a config names."""
    return _REDUCERS[config.method](config, backbone)
