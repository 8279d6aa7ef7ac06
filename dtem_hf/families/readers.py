"""How models read the tokens of a merged encoder: one word per model class, and what follows from it.

A model needs no mixin where it looks at prefix tokens alone or attends to all tokens alike: the encoder returns the
tokens that still take part. The other readers open a scope with their word, and the encoder inside returns its tokens
as that reader needs them. The mixins change nothing where nothing was merged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..scope import Scope, current_scope, current_state, is_traced, open_scope
from ..token_state import TokenState
from .unmasked_attention import serve_attention


class ScopedForward:
    """Base of mixins that run the forward pass of the class they are mixed into inside a scope, same signature.

    `scoped` are the methods that do so, where the class has them.
    """

    scoped: tuple[str, ...] = ("forward",)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for name in cls.scoped:
            stock = getattr(super(), name, None)
            if stock is not None:  # else, of forward: the mixin itself, with no module below it yet
                setattr(cls, name, _scoped(stock))

    def _run_in_scope(self, stock: Callable[[], Any], inputs: dict[str, Any]) -> Any:
        """Call `stock`; `inputs` are its arguments by name."""
        raise NotImplementedError


def _scoped(stock: Callable[..., Any]) -> Callable[..., Any]:
    """A method that runs inside a scope."""
    names = list(signature(stock).parameters)[1:]

    @wraps(stock)  # torch.export and Trainer read the signature
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Of equal length: Dynamo of torch 2.9 knows no other zip.
        inputs = {**dict(zip(names[: len(args)], args[: len(names)], strict=True)), **kwargs}
        return self._run_in_scope(lambda: _untraced(lambda: stock(self, *args, **kwargs)), inputs)

    return method


def _untraced(call: Callable[[], Any]) -> Any:
    """Make a call inside a scope. torch.compile traces the scope along with it, or does not trace the call at all.

    Behind a graph break, it would trace parts of the call alone, which could not read a scope that was opened outside
    of their trace, and would quietly be those of the plain model.
    """
    return call() if is_traced() or ops.is_exporting() else _eagerly(call)


@torch.compiler.disable
def _eagerly(call: Callable[[], Any]) -> Any:
    return call()


class Reader(ScopedForward):
    """A model that reads the tokens of the encoder inside; subclasses say how."""

    reader: str

    def _run_in_scope(self, stock: Callable[[], Any], inputs: dict[str, Any]) -> Any:
        with open_scope(Scope(reader=self.reader)):
            return stock()


class MeanReader(Reader):
    """A model that takes the plain mean of the patch tokens: they are scaled so that it is the one by sizes."""

    reader = "mean"


class MaskedMeanReader(Reader):
    """A model that takes the mean of all tokens but padding, by the mask of the tokens as they came."""

    reader = "masked_mean"


class WeighedReader(Reader):
    """A model with a part that attends to all tokens by a mask of their sizes: `WeighedCrossAttention`."""

    reader = "weighed"
    scoped = ("forward", "generate", "get_image_features", "get_qformer_features")


class MasksReader(Reader):
    """A model whose decoder makes a mask of each merged token, and puts the masks in the places of the patches."""

    reader = "masks"


class GridReader(Reader):
    """A model that needs all tokens in place, and makes the encoder's mask of the one that it is given, or of none."""

    reader = "grid"

    def _run_in_scope(self, stock: Callable[[], Any], inputs: dict[str, Any]) -> Any:
        masked = None if "input_ids" in inputs else inputs.get("attention_mask") is not None  # else it is the text's
        with open_scope(Scope(reader=self.reader, masked=masked)):
            return stock()


class RecordingGridReader(GridReader):
    """A `GridReader` that records the hidden states of the encoder's layers itself."""

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
# The readers that get all tokens back in place.
RETURN_ALL = ("grid", "masked_mean", "rows")
# Those that take means, of tokens that are weighed for it.
MEANS = ("mean", "masked_mean")
# Those that get the tokens that still take part: a soft merge keeps those that it merges away, behind all others.
HANDED_ON = ("tokens", "sized")


def returned(output: Any, state: TokenState, reader: str, unmerge: bool) -> Any:
    """The output of a merged encoder as its reader needs it; `unmerge`: with all tokens back in place.

    `output` is a ModelOutput or a tuple that begins with the last hidden state.
    """
    last = output[0]
    state.unmerged = unmerge
    state.move_to(state.num_layers, last.device)
    if unmerge:
        last = ops.unmerge_tokens(last, state.source(-1))
    elif reader in HANDED_ON:
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
    """An encoder's output with another last hidden state."""
    if isinstance(output, tuple):
        return (last, *output[1:])
    output[next(iter(output))] = last
    return output


def weigh_tokens(x: Tensor, state: TokenState, unmerged: bool = False) -> Tensor:
    """Scale patch tokens so that their plain mean is the one weighted by sizes: [B, n, D] -> [B, n, D].

    Where they are back in place (`unmerged`), hard-merged tokens are there as often as they count, and stay.
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
    if not soft:  # a soft merge keeps all tokens, and the mean goes on dividing by as many
        total = weights.detach().sum(dim=1, keepdim=True) if state.kept else weights.shape[1]
        weights = weights * total / weights.sum(dim=1, keepdim=True)
    weighed = (x[:, prefix:].float() * weights.unsqueeze(-1)).to(x.dtype)
    return torch.cat([x[:, :prefix], weighed], dim=1)


def _unmerge_recorded(output: Any, state: TokenState) -> Any:
    """Put the tokens of an output's hidden states back; in a plain tuple of parts, they are known by their number."""

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
    """A pooler that takes the plain mean of the patch tokens it is given, where it has a `layernorm`."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        state = current_state()
        if state is not None and getattr(self, "layernorm", None) is not None:
            hidden_states = weigh_tokens(hidden_states, state)
        return super().forward(hidden_states)  # type: ignore[misc]


class WeighedAttention:
    """An `nn.MultiheadAttention` whose keys are merged tokens: each counts as many times as it stands for patches."""

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
    """A Q-Former or decoder that cross-attends to merged tokens: each counts as often as it stands for patches.

    The scope holds their sizes, of the encoder that has run inside or, in generation, of the one that ran before.
    """

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        tokens: Tensor | None = kwargs.get("encoder_hidden_states")
        if tokens is not None and (bias := read_bias(tokens, self.dtype)) is not None:
            serve_attention(self.config._attn_implementation)
            ids = kwargs.get("input_ids")
            words = kwargs.get("inputs_embeds") if ids is None else ids
            if words is not None and "query_embeds" not in kwargs:  # some decoders want a row for every word
                bias = bias.expand(-1, -1, words.shape[1], -1)
            kwargs["encoder_attention_mask"] = bias
        return super().forward(*args, **kwargs)  # type: ignore[misc]


def read_bias(tokens: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The additive mask for attention to tokens that a reader got, [B, n, D]: [B, 1, 1, n]; None: all count alike."""
    scope = current_scope()
    if scope is None or scope.sizes is None:
        return None
    return ops.size_bias(scope.sizes.to(tokens.device), ops.attention_dtype(dtype, tokens.device.type))


def read_sizes(state: TokenState, reader: str, unmerge: bool) -> Tensor | None:
    """Sizes of the tokens as the reader gets them: [B, n] float32; None where each of them counts once."""
    sizes = state.final_sizes
    if sizes is None or (unmerge and not state.merges_softly):
        return None  # back in place, hard-merged tokens are there as often as they count
    if unmerge:
        return sizes.gather(1, state.source(-1))
    return sizes[:, : state.num_active] if reader in HANDED_ON else sizes
