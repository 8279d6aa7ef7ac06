"""For what reads the tokens of a merged encoder: averages and pooling heads that weigh them, grids that are whole.

The mixins ask for the scope of the pass they run in, and leave everything as it is where nothing was merged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..scope import Scope, current_scope, current_state, open_scope
from ..token_state import TokenState


_RECORDERS = "transformers.utils.output_capturing"


def weigh_tokens(x: Tensor, state: TokenState, unmerged: bool = False) -> Tensor:
    """Scale patch tokens so that their plain mean is the one weighted by sizes: [B, n, D] -> [B, n, D].

    Where they are back in place (`unmerged`), hard-merged tokens are there as often as they count, and stay.
    """
    sizes = state.final_sizes
    if sizes is None:
        return x
    soft = sizes.shape[1] == state.num_tokens
    if unmerged:
        if not soft:
            return x
        sizes = sizes.gather(1, state.source(-1))
    prefix = state.num_prefix_tokens
    weights = sizes[:, prefix:].to(x.device)
    if not soft:  # a soft merge keeps all tokens, and the mean goes on dividing by as many
        weights = weights * weights.shape[1] / weights.sum(dim=1, keepdim=True)
    weighed = (x[:, prefix:].float() * weights.unsqueeze(-1)).to(x.dtype)
    return torch.cat([x[:, :prefix], weighed], dim=1)


def finish_output(output: Any, state: TokenState, unmerge: bool, average: bool, drop: bool = False) -> Any:
    """What a merged encoder hands on, as is wanted: weighed for a plain mean, with all tokens back in place, or, where
    `drop` is, without those that were softly merged away.

    `output` is a ModelOutput or a tuple that begins with the last hidden state.
    """
    last = output[0]
    state.bring(state.num_layers, last.device)
    if unmerge:
        last = ops.unmerge_tokens(last, state.source(-1))
    elif drop:
        last = last[:, : state.num_active]
    output = _with_last(output, weigh_tokens(last, state, unmerge) if average else last)
    if not unmerge:
        return output
    if isinstance(output, tuple):
        return (output[0], *(_unmerge_recorded(part, state) for part in output[1:]))
    if output.get("hidden_states") is not None:
        output["hidden_states"] = _unmerge_recorded(output["hidden_states"], state)
    return output


def _with_last(output: Any, last: Tensor) -> Any:
    """An output with another last hidden state."""
    if isinstance(output, tuple):
        return (last, *output[1:])
    output[next(iter(output))] = last
    return output


def _unmerge_recorded(states: Any, state: TokenState) -> Any:
    """Put the tokens of recorded hidden states back; of a plain tuple's parts, they are known by their number."""
    if not isinstance(states, tuple) or len(states) != state.num_layers + 1:
        return states
    put_back = [
        x if x is None else ops.unmerge_tokens(x, state.source(i).to(x.device)) for i, x in enumerate(states[1:])
    ]
    return (states[0], *put_back)


class ScopedForward:
    """Base of mixins that run the forward pass of what they are mixed into inside a scope, under its own signature."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        stock = getattr(super(), "forward", None)
        if stock is None:  # the mixin itself, with no module below it yet
            return
        names = list(signature(stock).parameters)[1:]

        @wraps(stock)  # torch.export and Trainer read the signature
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            # Of equal length: Dynamo of torch 2.9 knows no other zip.
            inputs = {**dict(zip(names[: len(args)], args[: len(names)], strict=True)), **kwargs}
            return self._run_in_scope(lambda: stock(self, *args, **kwargs), inputs)

        cls.forward = forward  # type: ignore[attr-defined]

    def _run_in_scope(self, stock: Callable[[], Any], inputs: dict[str, Any]) -> Any:
        """Call `stock`; `inputs` are its arguments by name."""
        raise NotImplementedError


class Averaging(ScopedForward):
    """A model that takes the plain mean of the tokens that a module inside hands on."""

    def _run_in_scope(self, stock: Callable[[], Any], inputs: dict[str, Any]) -> Any:
        with open_scope(Scope(averages=True)):
            return stock()


class ReadsPrefix(ScopedForward):
    """A model that reads the prefix tokens of the encoder inside, and hands no others on."""

    def _run_in_scope(self, stock: Callable[[], Any], inputs: dict[str, Any]) -> Any:
        with open_scope(Scope(reads_prefix=True)):
            return stock()


def is_watched(modules: Iterable[nn.Module]) -> bool:
    """Whether a hook of anybody's may see what some modules compute; transformers' recorders are asked elsewhere."""
    for module in modules:
        if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return True
        if any(hook.__module__ != _RECORDERS for hook in module._forward_hooks.values()):
            return True
    return False


class ReadingAlike(ScopedForward):
    """A model whose decoder attends to all tokens that a module inside hands on, whatever their sizes."""

    def _run_in_scope(self, stock: Callable[[], Any], inputs: dict[str, Any]) -> Any:
        with open_scope(Scope(drops=True)):
            return stock()


class MaskedAveraging(ScopedForward):
    """A model that takes the mean of the tokens that are no padding, by the mask of the tokens as they came."""

    def _run_in_scope(self, stock: Callable[[], Any], inputs: dict[str, Any]) -> Any:
        with open_scope(Scope(averages=True, unmerges=True)):
            return stock()


class Between(ScopedForward):
    """A module that hands the encoder inside a mask of its own making, made from the one that it is given, or of none.

    When a model is exported, transformers makes one in which all tokens see all tokens.
    """

    def _run_in_scope(self, stock: Callable[[], Any], inputs: dict[str, Any]) -> Any:
        outer = current_scope()
        with open_scope(Scope(masked=inputs.get("attention_mask") is not None)) as inner:
            output = stock()
        if outer is not None and not outer.closed:
            outer.state = inner.state
            outer.num_tokens += inner.num_tokens
            output = self._hand_on(output, outer, inner)
        return output

    def _hand_on(self, output: Any, outer: Scope, inner: Scope) -> Any:
        return output


class Averaged(Between):
    """A module between an encoder and a model that averages: what the encoder hands on is normalised in it first."""

    def _hand_on(self, output: Any, outer: Scope, inner: Scope) -> Any:
        if outer.averages and inner.state is not None and inner.state.changed:
            return _with_last(output, weigh_tokens(output[0], inner.state, inner.unmerged))
        return output


class WeighedMean:
    """A pooler that takes the plain mean of the patch tokens it is given."""

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
        return super().forward(query, key, value, attn_mask=attn_mask, **kwargs)  # type: ignore[misc]
