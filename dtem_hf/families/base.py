"""What has to be known about a family of encoders, and where merging enters its layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..embedding import KeyProjection, mean_key_projection
from ..errors import BadValue, UnsupportedModelError
from ..methods import AttentionInputs, Reducer
from ..schedule import EncoderCost, LayerCost, MetricCost
from ..scope import current_state
from ..token_state import TokenState
from .readers import Averaging, ReadsPrefix, ScopedForward
from .transition import (
    AttentionPass,
    LayerParts,
    OpenAttention,
    OpenMLP,
    has_own_weight,
    opens,
    opens_mlp,
    run_fused,
    takes_more,
)


# Arguments that ask for nothing where they are off.
_SWITCHES = ("output_attentions", "use_cache")


class LayerMerging:
    """Mixed into a family's own layer class; the family's subclass writes the forward pass with `merge_step` in it.

    `merge_index` is the layer's place in the encoder, `merge_reducer` what happens between attention and MLP. The
    forward pass gets `token_state`, which is None where the encoder runs unmerged.
    """

    merge_index: int
    merge_reducer: Reducer[Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Handed to the forward pass, as one that is run again (gradient checkpointing) finds no scope.
        if kwargs.get("token_state") is None and (state := current_state()) is not None:
            kwargs["token_state"] = state
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def fused_parts(self) -> LayerParts | None:
        """The modules of a layer that is built as `LayerParts` says; None for one that is not."""
        return None

    def run_fused(
        self, hidden_states: Tensor, attention_mask: Tensor | None, state: TokenState, others: Mapping[str, Any]
    ) -> Tensor | None:
        """The whole layer as one call: [B, n, D] -> [B, n', D]; None where its modules have to run.

        `others` are arguments of the layer; of most, only its modules know what to do with them.
        """
        for name, value in others.items():
            # Hidden states are recorded where a layer is called.
            if name != "output_hidden_states" and not (name in _SWITCHES and value in (None, False)):
                return None
        return run_fused(self, hidden_states, attention_mask, state)

    def attention_bias(self, hidden_states: Tensor, attention_mask: Tensor | None, state: TokenState) -> Tensor | None:
        """The additive mask to hand to the layer's attention; what the tokens carry comes to the layer's device."""
        state.bring(self.merge_index, hidden_states.device)
        wanted = self.merge_reducer.wants_bias(self)  # type: ignore[arg-type]
        return state.attention_bias(self.merge_index, hidden_states.dtype, attention_mask, wanted)

    def run_attention(
        self, attention: Any, state: TokenState, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, AttentionPass]:
        """What attention makes of [B, n, D], or of the rows that are read, [B, P, D]; and what else it hands out.

        `args` and `kwargs` are as in the stock layer, since hooks see them, and `attention_pass` beside them.
        """
        if not isinstance(attention, OpenAttention) or not takes_more(attention):
            attended = attention(*args, **kwargs)
            return attended[0] if isinstance(attended, tuple) else attended, AttentionPass()
        inside = AttentionPass(state.rows_read(self.merge_index), state.has_merged(self.merge_index))
        attended, _ = attention(*args, attention_pass=inside, **kwargs)  # type: ignore[operator]
        return attended, inside

    def merge_step(
        self,
        hidden_states: Tensor,
        normed: Tensor,
        state: TokenState,
        bias: Tensor | Callable[[], Tensor | None] | None = None,
        rotate: Callable[[Tensor], Tensor] | None = None,
        inside: AttentionPass | None = None,
    ) -> Tensor:
        """Reduce the tokens behind attention: [B, n, D] -> [B, n', D]. The rest: see `AttentionInputs`.

        `inside` comes from `run_attention`: rows that it left out need no merge.
        """
        if inside is not None and inside.num_rows is not None:
            state.hand_on_rows(self.merge_index, inside.num_rows)
            return hidden_states
        inputs = AttentionInputs(bias, rotate, None if inside is None else inside.keys)
        return self.merge_reducer.reduce(hidden_states, normed, self, self.merge_index, state, inputs)  # type: ignore[arg-type]

    def run_mlp(self: Any, normed: Tensor, state: TokenState) -> Tensor:
        """The layer's MLP, which knows whether the tokens before it were merged: [B, n, D] -> [B, n, D]."""
        mlp: Any = self.mlp
        if isinstance(mlp, OpenMLP) and state.has_merged(self.merge_index + 1) and takes_more(mlp):
            return mlp(normed, merged=True)  # type: ignore[operator]
        return mlp(normed)


class Backbone(ABC):
    """One family. Stateless: everything is read off the encoder that is passed in.

    `encoder_class` is the stock module that runs the layers, `layer_merging` the mixin for them. `models` are the
    whole models in which that encoder may be merged, by the Auto class that yields them; `other_models` those that no
    Auto class yields. Of these, `composites` do more than see, and are costed by their encoder alone; `averaging`
    average the tokens that the encoder hands on, without knowing their sizes; `dense` read all tokens in place;
    `prefix_readers` read none but the prefix tokens, and show no others to anybody. `open_attention` is the mixin for
    self-attentions that are made of the parts it names.
    """

    encoder_class: ClassVar[type[nn.Module]]
    layer_merging: ClassVar[type[LayerMerging]]
    models: ClassVar[Mapping[str, tuple[type[nn.Module], ...]]]
    other_models: ClassVar[tuple[type[nn.Module], ...]] = ()
    composites: ClassVar[tuple[type[nn.Module], ...]] = ()
    averaging: ClassVar[tuple[type[nn.Module], ...]] = ()
    open_attention: ClassVar[type[OpenAttention] | None] = None
    dense: ClassVar[tuple[type[nn.Module], ...]] = ()
    prefix_readers: ClassVar[tuple[type[nn.Module], ...]] = ()

    def all_models(self) -> tuple[type[nn.Module], ...]:
        """Every model class of the family, once."""
        return tuple(dict.fromkeys([*(cls for group in self.models.values() for cls in group), *self.other_models]))

    def model_mixins(self, model_class: type) -> tuple[type, ...]:
        """Mixins for a merged model of a class, in front of the class itself."""
        if self.reads_prefix(model_class):
            return (ReadsPrefix,)
        return (Averaging,) if issubclass(model_class, self.averaging) else ()

    def reads_prefix(self, model_class: type) -> bool:
        """Whether models of a class read the prefix tokens alone; one with a `forward` of its own may read others."""
        with_forward = (cls for cls in model_class.__mro__ if "forward" in vars(cls))
        return next(cls for cls in with_forward if not issubclass(cls, ScopedForward)) in self.prefix_readers

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

    @abstractmethod
    def query_linear(self, layer: nn.Module) -> nn.Module:
        """The module that maps a layer's normalised input to queries."""

    def readers(self, model: nn.Module, encoder: nn.Module) -> Iterator[tuple[nn.Module, type]]:
        """Modules that read merged tokens or their number, each with the mixin that makes it read them right."""
        yield from ()

    def opened_parts(self, model: nn.Module, encoder: nn.Module) -> Iterator[tuple[nn.Module, type]]:
        """Modules that the layers run in another way, or that read tokens, each with the mixin that it needs."""
        yield from self.readers(model, encoder)
        for layer in self.layers(encoder):
            if self.open_attention is not None and self.hands_out_keys(layer):
                yield self.attention(layer), self.open_attention
            mlp = getattr(layer, "mlp", None)
            if opens_mlp(mlp):
                yield mlp, OpenMLP

    def hands_out_keys(self, layer: nn.Module) -> bool:
        """Whether the attention of a layer hands out the keys it computed."""
        return self.open_attention is not None and opens(self.attention(layer), self.encoder_class)

    def row_cost(self, layer: nn.Module) -> int:
        """Multiply-adds of what attention spends on each row of its output alone: queries, and the last projection."""
        raise NotImplementedError

    def padding_sizes(self, encoder: nn.Module, inputs: Mapping[str, Any]) -> Tensor | None:
        """Sizes [B, N] for inputs that come with padding (size 0), read off the encoder's arguments; None: no such."""
        return None

    def check(self, model: nn.Module, encoder: nn.Module) -> None:  # noqa: B027 (most have nothing to check)
        """Raise UnsupportedModelError for a model of the family that is set up in a way that cannot be merged."""

    def keys(self, layer: nn.Module, normed: Tensor) -> Tensor:
        """Attention keys as the layer computes them: [B, n, D] -> [B, n, H, d]."""
        linear, heads = self.key_linear(layer)
        return linear(normed).unflatten(-1, (heads, -1))

    def queries(self, layer: nn.Module, normed: Tensor) -> Tensor:
        """Attention queries as the layer computes them: [B, n, D] -> [B, n, H, d]."""
        return self.query_linear(layer)(normed).unflatten(-1, (self.key_linear(layer)[1], -1))

    def key_projection(self, layer: nn.Module) -> KeyProjection:
        """The map to attention keys, as weights."""
        linear, heads = self.key_linear(layer)
        return KeyProjection(linear.weight, linear.bias, heads)  # type: ignore[arg-type]

    def mean_keys(self, layer: nn.Module, normed: Tensor) -> Tensor:
        """Attention keys averaged over heads: [B, n, D] -> [B, n, d]."""
        if has_own_weight(self.key_linear(layer)[0]):
            return F.linear(normed, *mean_key_projection(self.key_projection(layer)))
        return self.keys(layer, normed).mean(dim=-2)

    def first_token_attention(self, layer: nn.Module, normed: Tensor, inputs: AttentionInputs) -> Tensor:
        """How much the first token attends to each token, averaged over heads: [B, n, D] -> [B, n], float32.

        From the layer's own projections, whatever the attention implementation. The first token is never rotated.
        """
        query = self.queries(layer, normed[:, :1]).transpose(1, 2)  # [B, H, 1, d]
        keys = self.keys(layer, normed) if inputs.keys is None else inputs.keys.unflatten(-1, query.shape[1::2])
        keys = keys.transpose(1, 2)  # [B, H, n, d]
        if inputs.rotate is not None:
            keys = inputs.rotate(keys)
        scores = (query @ keys.transpose(2, 3)).float() * query.shape[-1] ** -0.5
        bias = inputs.bias() if callable(inputs.bias) else inputs.bias
        if bias is not None and bias.dtype == torch.bool:  # a mask that a user gave, as SDPA takes it
            scores = scores.masked_fill(~bias[:, :, :1], -torch.inf)
        elif bias is not None:
            scores = scores + bias[:, :, :1].float()
        return scores.softmax(dim=-1).mean(dim=1).squeeze(1)

    def num_tokens(self, encoder: nn.Module, image_size: int | tuple[int, int] | None = None) -> int:
        """Tokens that enter the first layer for an image of a size in pixels (None: the model's own)."""
        config: Any = encoder.config
        height, width = _pair(config.image_size if image_size is None else image_size, "image_size")
        patch_height, patch_width = _pair(config.patch_size, "patch_size")
        if height < patch_height or width < patch_width:
            raise BadValue("image_size", image_size, f"at least one patch of {patch_height}×{patch_width} pixels")
        return (height // patch_height) * (width // patch_width) + self.num_prefix_tokens(encoder)

    def frames(self, model: nn.Module) -> int:
        """How many images a model sees at once; their tokens are handed on together."""
        return 1

    def encoder_cost(
        self, model: nn.Module, encoder: nn.Module, metric_cost: Callable[[nn.Module], MetricCost]
    ) -> EncoderCost:
        """Count the multiply-adds of matrix products and convolutions, as `torch.utils.flop_counter` does."""
        layers = self.layers(encoder)
        inside = {id(module) for layer in layers for module in layer.modules()}
        merge_embedding = getattr(encoder, "merge_embedding", None)
        if merge_embedding is not None:
            inside |= {id(module) for module in merge_embedding.modules()}
        seeing = encoder if isinstance(model, self.composites) else model
        outside = [module for module in seeing.modules() if id(module) not in inside]
        stem, head, tail = self.outside_cost(outside)
        return EncoderCost(
            layers=tuple(self._layer_cost(layer, metric_cost(layer)) for layer in layers),
            stem=stem,
            head=head,
            tail=tail,
            num_prefix_tokens=self.num_prefix_tokens(encoder),
            row_cost=self.row_cost(layers[-1]) if self.narrows(model, layers[-1]) else None,
        )

    def narrows(self, model: nn.Module, last: nn.Module) -> bool:
        """Whether the last layer computes the prefix tokens alone, where nobody looks at the others."""
        return self.reads_prefix(type(model)) and self.hands_out_keys(last)

    def outside_cost(self, modules: Sequence[nn.Module]) -> tuple[int, int, int]:
        """Multiply-adds of the modules around the layers: per patch, per image, and per token handed on."""
        return sum(m.weight.numel() for m in modules if isinstance(m, nn.Conv2d)), linear_cost(modules), 0

    def _layer_cost(self, layer: nn.Module, metric: MetricCost) -> LayerCost:
        before = list(self.attention(layer).modules())
        seen = {id(module) for module in before}
        after = [module for module in layer.modules() if id(module) not in seen]
        return LayerCost(
            before=linear_cost(before),
            per_pair=2 * self.key_projection(layer).weight.shape[0],
            after=linear_cost(after),
            metric=metric,
        )


def linear_cost(modules: Sequence[nn.Module]) -> int:
    """Multiply-adds of all linear maps among modules, each applied to one token."""
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
