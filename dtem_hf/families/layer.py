"""The forward pass of a merged layer, for all families with pre-norm layers (docs/method.md section 1)."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..scope import Scope, current_state, open_scope
from ..token_state import TokenState
from .anatomy import Anatomy


class LayerMerging:
    """Mixin for a family's layer class. `merge_index` is the layer's index in the encoder.

    A family whose attention needs more than a size bias overrides `attention_inputs`. A family with another MLP
    overrides `feed_forward`, one with another layer `merged_forward`.
    """

    merge_index: int
    training: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Pass the state as an argument: gradient checkpointing runs the forward pass again outside of every scope.
        if (state := current_state()) is not None:
            kwargs.setdefault("token_state", state)
        elif not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:  # in a backward pass
            raise UnsupportedModelError(
                f"{type(self).__name__}: a checkpoint around a merged layer runs it again without the sizes of its "
                "tokens; use model.gradient_checkpointing_enable() instead of a wrapper around layers."
            )
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def forward(self, hidden_states: Tensor, *args: Any, token_state: TokenState | None = None, **kwargs: Any) -> Any:
        if token_state is None:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        token_state.enter(self.merge_index, hidden_states)
        if token_state.layers_read is not None and self.merge_index >= token_state.layers_read:
            token_state.record_unchanged(self.merge_index, hidden_states)
            return hidden_states
        if token_state.finished:
            with open_scope(Scope(state=token_state, closed=True)):
                return self.merged_forward(hidden_states, token_state, *args, **kwargs)
        return self.merged_forward(hidden_states, token_state, *args, **kwargs)

    def merged_forward(
        self: Any, hidden_states: Tensor, state: TokenState, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Run the layer with a merge between attention and MLP, or behind both: [B, n, D] -> [B, n', D]."""
        parts = state.anatomy
        bias = self.attention_inputs(hidden_states, attention_mask, state, kwargs)
        normed = getattr(self, parts.norm1)(hidden_states)
        attended = getattr(self, parts.attention)(normed, attention_mask=bias, **kwargs)
        if isinstance(attended, tuple):
            attended = attended[0]
        # The residual comes first: a sum has the memory layout of its first term, and the rounding of RMS norms
        # depends on the layout.
        hidden_states = hidden_states + self.branch(attended, parts.branch1)
        if state.method.between:
            hidden_states = self.feed_forward(hidden_states, parts)
            return state.method.reduce(hidden_states, normed, self, state, bias)
        hidden_states = state.method.reduce(hidden_states, normed, self, state, bias)
        # The MLP needs the most memory. Free the tensors that are not read again first.
        state.projected = None
        del attended, normed, bias
        return self.feed_forward(hidden_states, parts)

    def feed_forward(self: Any, x: Tensor, parts: Anatomy) -> Tensor:
        """Run the layer's MLP with its residual sum: [B, n, D] -> [B, n, D]."""
        grown = getattr(self, parts.mlp)(getattr(self, parts.norm2)(x))
        return x + self.branch(grown, parts.branch2)

    def branch(self, x: Tensor, names: tuple[str, ...]) -> Tensor:
        """Apply a branch's modules and multiply by its parameters, in order: [B, n, D] -> [B, n, D]."""
        for name in names:
            part = getattr(self, name)
            x = part(x) if isinstance(part, nn.Module) else part * x
        return x

    def attention_inputs(
        self, hidden_states: Tensor, attention_mask: Tensor | None, state: TokenState, kwargs: dict[str, Any]
    ) -> Tensor | None:
        """The additive mask for the layer's attention.

        `kwargs` are the other arguments of the attention; a family may change them.
        """
        index = self.merge_index
        return state.attention_bias(index, hidden_states.dtype, attention_mask, state.method.wants_bias(self.training))

    def keys(self: Any, normed: Tensor, state: TokenState) -> Tensor:
        """Attention keys as the layer computes them, before any rotation: [B, n, D] -> [B, n, H, d].

        If the key projection has the hook `remember_keys`, these are the keys that attention has just computed.
        """
        module = attrgetter(state.anatomy.key)(self)
        if state.projected is not None and state.projected[0] is module:
            projected = state.projected[1]
        else:  # a module that replaced the hooked one
            with torch.no_grad():
                projected = module(normed)
        return _by_heads(self, projected, state.anatomy, 1)

    def rotated(self, keys: Tensor, state: TokenState) -> Tensor:
        """The keys with the layer's rotation, if its family has one: [B, H, n, d] -> [B, H, n, d]."""
        return keys

    def first_token_attention(self: Any, normed: Tensor, bias: Tensor | None, state: TokenState) -> Tensor:
        """The first token's attention to each token, averaged over heads: [B, n, D] -> [B, n], float32.

        It is computed from the layer's projections, for every attention implementation. The first token is never
        rotated.
        """
        keys = self.rotated(self.keys(normed, state).transpose(1, 2), state)  # [B, H, n, d]
        query = attrgetter(state.anatomy.query)(self)(normed[:, :1])
        query = _by_heads(self, query, state.anatomy, 0).transpose(1, 2)  # [B, H, 1, d]
        scores = (query @ keys.transpose(2, 3)).float() * query.shape[-1] ** -0.5
        if bias is not None and bias.dtype == torch.bool:  # the user's mask, in SDPA's form
            scores = scores.masked_fill(~bias[:, :, :1], -torch.inf)
        elif bias is not None:
            scores = scores + bias[:, :, :1].float()
        return scores.softmax(dim=-1).mean(dim=1).squeeze(1)


def _by_heads(layer: Any, projected: Tensor, parts: Anatomy, part: int) -> Tensor:
    """Split a projection's output into heads, of queries (part 0) or keys (part 1): [B, n, E] -> [B, n, H, d]."""
    if parts.packed:
        projected = projected.chunk(3, dim=-1)[part]
    return projected.unflatten(-1, (attrgetter(parts.heads)(layer), -1))


def remember_keys(module: nn.Module, args: Any, output: Tensor) -> None:
    """Forward hook on key projections: the running pass keeps their output until the layer has merged."""
    state = current_state()
    if state is not None:
        state.projected = module, output


def forget_keys(module: nn.Module) -> None:
    """Remove the hook `remember_keys` from a module."""
    hooks = module._forward_hooks
    for number in [number for number, hook in hooks.items() if hook is remember_keys]:
        del hooks[number]
