"""Readers: how models read the tokens of a merged encoder, one word per model class, and its mixin.

A model needs no mixin if it reads only prefix tokens, or attends to all tokens alike: the encoder returns the active
tokens. Other readers open a scope with their word, and the encoder inside returns its tokens as the reader needs them.
Without a merge, the mixins change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..scope import CHANGING_BLOCKS, Scope, current_scope, current_state, is_traced, open_scope
from ..token_state import TokenState
from .unmasked_attention import enable_size_bias


class ScopedForward:
    """Base of mixins that run methods of a class inside a scope, with the same signatures.

    `scoped` are the names of these methods; a name that the class lacks is skipped.
    """

    scoped: tuple[str, ...] = ("forward",)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for name in cls.scoped:
            stock = getattr(super(), name, None)
            if stock is not None:  # None: this class is a mixin, without a model class as its base
                setattr(cls, name, _scoped(stock))

    def _run_in_scope(self, stock: Callable[[], Any], inputs: dict[str, Any]) -> Any:
        """Call `stock`, the class's own method, inside a scope; `inputs` are its arguments by name."""
        raise NotImplementedError


def _scoped(stock: Callable[..., Any]) -> Callable[..., Any]:
    """The method `stock`, run inside a scope."""
    names = list(signature(stock).parameters)[1:]

    @wraps(stock)  # torch.export and Trainer read the signature
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Slices of equal length: Dynamo of torch 2.9 supports no other zip.
        inputs = {**dict(zip(names[: len(args)], args[: len(names)], strict=True)), **kwargs}

        def run() -> Any:
            return self._run_in_scope(lambda: _untraced(lambda: stock(self, *args, **kwargs)), inputs)

        return _eagerly(run) if CHANGING_BLOCKS and torch.compiler.is_dynamo_compiling() else run()

    return method


def _untraced(call: Callable[[], Any]) -> Any:
    """Make a call inside a scope. If torch.compile does not trace the scope, too, the call runs without compilation.

    Behind a graph break, torch.compile would trace parts of the call alone. They could not read a scope that was
    opened outside of their trace, and would silently compute the plain model.
    """
    return call() if is_traced() or ops.is_exporting() else _eagerly(call)


@torch.compiler.disable(reason="inside trace_merging() and unmerged(), and behind a graph break")
def _eagerly(call: Callable[[], Any]) -> Any:
    return call()


class Reader(ScopedForward):
    """Mixin for a model that reads the tokens of the encoder inside; `reader` says how."""

    reader: str

    def _run_in_scope(self, stock: Callable[[], Any], inputs: dict[str, Any]) -> Any:
        with open_scope(Scope(reader=self.reader)):
            return stock()


class MeanReader(Reader):
    """For a model that takes the plain mean of patch tokens: the encoder scales them, so that it is size-weighted."""

    reader = "mean"


class MaskedMeanReader(Reader):
    """For a model that takes the mean of all tokens but padding, by the mask of the input tokens."""

    reader = "masked_mean"


class WeighedReader(Reader):
    """For a model with a part that attends to all tokens by their sizes, such as `WeighedCrossAttention`."""

    reader = "weighed"
    scoped = ("forward", "generate", "get_image_features", "get_qformer_features")


class MasksReader(Reader):
    """For a model whose decoder makes a mask from each merged token, and unmerges the masks itself."""

    reader = "masks"


class GridReader(Reader):
    """For a model that needs all tokens in place. It may make a mask for the encoder even if the user gave none."""

    reader = "grid"

    def _run_in_scope(self, stock: Callable[[], Any], inputs: dict[str, Any]) -> Any:
        # With `input_ids`, attention_mask is the mask of the text.
        masked = None if "input_ids" in inputs else inputs.get("attention_mask") is not None
        with open_scope(Scope(reader=self.reader, masked=masked)):
            return stock()


class RecordingGridReader(GridReader):
    """A `GridReader` for a model that records the hidden states of the encoder's layers itself."""

    def _run_in_scope(self, stock: Callable[[], Any], inputs: dict[str, Any]) -> Any:
        with open_scope(Scope(reader=self.reader)) as scope:
            output = stock()
        return output if scope.state is None or not scope.state.changed else _unmerge_recorded(output, scope.state)


READERS: Mapping[str, tuple[type, ...]] = {
    "tokens": (),
    "mean": (MeanReader,),
    "masked_mean": (MaskedMeanReader,),
    "weighed": (WeighedReader,),
    "masks": (MasksReader,),
    "grid": (GridReader,),
    "rows": (),
}

# The entry of an encoder's output that holds the tokens' sizes, for a decoder that attends to them later.
TOKEN_SIZES = "token_sizes"
# The readers that cannot work without all tokens in place, and all readers that get them.
NEED_ALL = ("grid", "rows")
RETURN_ALL = (*NEED_ALL, "masked_mean")
# The readers that take means; the encoder scales their tokens.
MEANS = ("mean", "masked_mean")
# The readers that get only active tokens: a soft merge keeps inactive tokens behind all others.
ACTIVE_ONLY = ("tokens", "sized")


def output_for_reader(output: Any, state: TokenState, reader: str, unmerge: bool) -> Any:
    """The output of a merged encoder in the form that its reader needs; `unmerge`: with all tokens in place.

    `output` is a ModelOutput, or a tuple that begins with the last hidden state.
    """
    last = output[0]
    state.unmerged = unmerge
    state.move_to(state.num_layers, last.device)
    if unmerge:
        last = ops.unmerge_tokens(last, state.source(-1))
    elif reader in ACTIVE_ONLY:
        last = last[:, : state.num_active]
    if reader in MEANS:
        last = weigh_tokens(last, state, unmerge)
    output = with_last(output, last)
    if reader == "sized" and isinstance(output, dict) and output.get("hidden_states") is not None:
        states = output["hidden_states"]
        kept = [state.num_active if i in state.stacked else state.num_active_after(i) for i in range(len(states))]
        output["hidden_states"] = tuple(
            x if x is None else state.stacked.get(i, x)[:, :number]
            for i, (x, number) in enumerate(zip(states, kept, strict=True))
        )
    return _unmerge_recorded(output, state) if unmerge else output


def with_last(output: Any, last: Tensor) -> Any:
    """Replace the last hidden state of an encoder's output."""
    if isinstance(output, tuple):
        return (last, *output[1:])
    output[next(iter(output))] = last
    return output


def weigh_tokens(x: Tensor, state: TokenState, unmerged: bool = False) -> Tensor:
    """Scale patch tokens so that their plain mean is the size-weighted mean: [B, n, D] -> [B, n, D].

    `unmerged`: all tokens are in place. A hard-merged token then appears once per patch, and needs no scaling.
    """
    sizes = state.final_sizes
    if sizes is None:
        return x
    soft = state.merges_softly
    if unmerged:
        if not soft:
            return x
        sizes = sizes.gather(1, state.source(-1))
    prefix = state.num_prefix_tokens
    weights = sizes[:, prefix:].to(x.device)
    if not soft:  # a soft merge keeps all tokens: the plain mean divides by the right number already
        total = weights.detach().sum(dim=1, keepdim=True) if state.kept else weights.shape[1]
        weights = weights * total / weights.sum(dim=1, keepdim=True)
    weighed = (x[:, prefix:].float() * weights.unsqueeze(-1)).to(x.dtype)
    return torch.cat([x[:, :prefix], weighed], dim=1)


def _unmerge_recorded(output: Any, state: TokenState) -> Any:
    """Unmerge an output's hidden states; in a plain tuple, they are the part with one entry per layer and one more."""

    def put_back(states: Any) -> Any:
        if not isinstance(states, tuple) or len(states) != state.num_layers + 1:
            return states
        behind = enumerate(states[1:])
        unmerged = (x if x is None else ops.unmerge_tokens(x, state.source(i).to(x.device)) for i, x in behind)
        return (states[0], *unmerged)

    if isinstance(output, tuple):
        return tuple(put_back(part) for part in output)
    if output.get("hidden_states") is not None:
        output["hidden_states"] = put_back(output["hidden_states"])
    return output


class WeighedMean:
    """Mixin for a pooler that takes the plain mean of patch tokens if it has a `layernorm`."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        state = current_state()
        if state is not None and getattr(self, "layernorm", None) is not None:
            hidden_states = weigh_tokens(hidden_states, state)
        return super().forward(hidden_states)  # type: ignore[misc]


class WeighedAttention:
    """Mixin for an `nn.MultiheadAttention` whose keys are merged tokens: a token of size m counts m times."""

    def forward(
        self: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        attn_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        state = current_state()
        bias = None if state is None else state.final_bias(query.dtype)
        if bias is not None:  # [B, 1, 1, n] -> [B · H, 1, n]
            bias = bias.to(query.device).squeeze(1)
            attn_mask = bias.repeat_interleave(self.num_heads, dim=0).expand(-1, query.shape[1], -1)
        return super().forward(query, key, value, *args, attn_mask=attn_mask, **kwargs)  # type: ignore[misc]


class WeighedCrossAttention:
    """Mixin for a Q-Former or decoder that cross-attends to merged tokens: a token of size m counts m times.

    The scope holds the sizes: of the encoder that ran inside it, or in generation of an earlier pass.
    """

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        tokens: Tensor | None = kwargs.get("encoder_hidden_states")
        if tokens is not None and (bias := read_bias(tokens, self.dtype)) is not None:
            enable_size_bias(self.config._attn_implementation)
            ids = kwargs.get("input_ids")
            words = kwargs.get("inputs_embeds") if ids is None else ids
            if words is not None and "query_embeds" not in kwargs:  # some decoders need one row per text token
                bias = bias.expand(-1, -1, words.shape[1], -1)
            kwargs["encoder_attention_mask"] = bias
        return super().forward(*args, **kwargs)  # type: ignore[misc]


def read_bias(tokens: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The additive mask for attention to a reader's tokens [B, n, D]: [B, 1, 1, n]; None if all count once."""
    scope = current_scope()
    if scope is None or scope.sizes is None:
        return None
    return ops.size_bias(scope.sizes.to(tokens.device), ops.attention_dtype(dtype, tokens.device.type))


def read_sizes(state: TokenState, reader: str, unmerge: bool) -> Tensor | None:
    """Sizes of the tokens that the reader gets: [B, n] float32; None if each counts once."""
    sizes = state.final_sizes
    if sizes is None or (unmerge and not state.merges_softly):
        return None  # in place, a hard-merged token appears once per patch
    if unmerge:
        return sizes.gather(1, state.source(-1))
    return sizes[:, : state.num_active] if reader in ACTIVE_ONLY else sizes
