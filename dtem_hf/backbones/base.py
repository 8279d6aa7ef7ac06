"""What has to be known about a family of encoders, and where merging enters its layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from ..embedding import KeyProjection, mean_key_projection
from ..errors import BadValue, UnsupportedModelError
from ..reducers import Reducer
from ..schedule import EncoderCost, LayerCost
from ..token_state import TokenState


class LayerMerging:
    """Mixed into a family's own layer class; the family's subclass writes the forward pass with `merge_step` in it.

    `merge_index` is the layer's place in the encoder, `merge_reducer` what happens between attention and MLP.
    """

    merge_index: int
    merge_reducer: Reducer[Any]

    def attention_bias(self, hidden_states: Tensor, attention_mask: Tensor | None, state: TokenState) -> Tensor | None:
        """The additive mask to hand to the layer's attention."""
        wanted = self.merge_reducer.wants_bias(self)  # type: ignore[arg-type]
        return state.attention_bias(self.merge_index, hidden_states.dtype, attention_mask, wanted)

    def merge_step(self, hidden_states: Tensor, normed: Tensor, state: TokenState) -> Tensor:
        """Reduce the tokens behind attention: [B, n, D] -> [B, n', D]."""
        return self.merge_reducer.reduce(hidden_states, normed, self, self.merge_index, state)  # type: ignore[arg-type]


class Backbone(ABC):
    """One family. Stateless: everything is read off the encoder that is passed in.

    `encoder_class` is the stock module that runs the layers and hands its keyword arguments on to them, `models` the
    whole models in which that encoder may be merged, by the Auto class that yields them, `layer_merging` the mixin for
    its layers.
    """

    encoder_class: ClassVar[type[nn.Module]]
    models: ClassVar[dict[str, type[nn.Module]]]
    layer_merging: ClassVar[type[LayerMerging]]

    @abstractmethod
    def layers(self, encoder: nn.Module) -> Sequence[nn.Module]:
        """The encoder's layers, in order."""

    @abstractmethod
    def num_prefix_tokens(self, encoder: nn.Module) -> int:
        """How many tokens in front of the patches are never merged."""

    @abstractmethod
    def attention(self, layer: nn.Module) -> nn.Module:
        """The part of a layer that runs in front of the merge."""

    @abstractmethod
    def key_linear(self, layer: nn.Module) -> tuple[nn.Module, int]:
        """The module that maps a layer's normalised input to keys, and the number of heads."""

    def key_projection(self, layer: nn.Module) -> KeyProjection:
        """The map to attention keys, as weights."""
        linear, heads = self.key_linear(layer)
        return KeyProjection(linear.weight, linear.bias, heads)  # type: ignore[arg-type]

    def mean_keys(self, layer: nn.Module, normed: Tensor) -> Tensor:
        """Attention keys averaged over heads: [B, n, D] -> [B, n, d]."""
        linear, heads = self.key_linear(layer)
        if type(linear) is nn.Linear:
            return F.linear(normed, *mean_key_projection(self.key_projection(layer)))
        # Whatever else stands there (LoRA, quantised weights) knows its own keys; its weight alone may not.
        return linear(normed).unflatten(-1, (heads, -1)).mean(dim=-2)

    def num_tokens(self, encoder: nn.Module, image_size: int | tuple[int, int] | None = None) -> int:
        """Tokens that enter the first layer for an image of a size in pixels (None: the model's own)."""
        config: Any = encoder.config
        height, width = _pair(config.image_size if image_size is None else image_size, "image_size")
        patch_height, patch_width = _pair(config.patch_size, "patch_size")
        if height < patch_height or width < patch_width:
            raise BadValue("image_size", image_size, f"at least one patch of {patch_height}×{patch_width} pixels")
        return (height // patch_height) * (width // patch_width) + self.num_prefix_tokens(encoder)

    def encoder_cost(
        self, model: nn.Module, encoder: nn.Module, metric_cost: Callable[[nn.Module], tuple[int, int]]
    ) -> EncoderCost:
        """Count the multiply-adds of matrix products and convolutions, as `torch.utils.flop_counter` does."""
        layers = self.layers(encoder)
        inside = {id(module) for layer in layers for module in layer.modules()}
        outside = [module for module in model.modules() if id(module) not in inside]
        merge_embedding = getattr(encoder, "merge_embedding", None)
        if merge_embedding is not None:
            learned = {id(module) for module in merge_embedding.modules()}
            outside = [module for module in outside if id(module) not in learned]
        return EncoderCost(
            layers=tuple(self._layer_cost(layer, *metric_cost(layer)) for layer in layers),
            stem=sum(m.weight.numel() for m in outside if isinstance(m, nn.Conv2d)),
            head=_linear_cost(outside),
            num_prefix_tokens=self.num_prefix_tokens(encoder),
        )

    def _layer_cost(self, layer: nn.Module, metric: int, metric_width: int) -> LayerCost:
        before = list(self.attention(layer).modules())
        seen = {id(module) for module in before}
        after = [module for module in layer.modules() if id(module) not in seen]
        return LayerCost(
            before=_linear_cost(before),
            per_pair=2 * self.key_projection(layer).weight.shape[0],
            after=_linear_cost(after),
            metric=metric,
            metric_width=metric_width,
        )


def _linear_cost(modules: Sequence[nn.Module]) -> int:
    return sum(m.in_features * m.out_features for m in modules if isinstance(m, nn.Linear))


def _pair(value: Any, name: str) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, (list, tuple)) else (value, value)
    if len(pair) != 2 or not all(isinstance(x, int) and not isinstance(x, bool) and x > 0 for x in pair):
        raise BadValue(name, value, "a number of pixels, or (height, width)")
    return pair


# The backends that add the size bias to their scores; others read a float mask as padding, or not at all.
EXACT_ATTENTION = ("eager", "sdpa")


def check_attention_implementation(name: str | None) -> None:
    """Refuse an attention backend that would not add log sizes to the scores."""
    if name is not None and name not in EXACT_ATTENTION:
        raise UnsupportedModelError(
            f"attn_implementation={name!r}: token sizes enter attention as an additive mask, which this backend does "
            f"not add; use one of {', '.join(EXACT_ATTENTION)}."
        )
