"""What the modules of one forward pass know of each other, without state on a module or a change of a signature.

A merged encoder opens a scope with its token state; its layers, and the heads that read its tokens, ask for the
innermost one. A scope belongs to a thread and a call: nested models and two threads never see each other's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from .token_state import TokenState


@dataclass
class Scope:
    """One open scope.

    `reader` says how the model that opened it reads the encoder's tokens (see `families.readers`); "": as was settled
    when the encoder was merged. `states_read` are the indices of the hidden states that it reads; None: it does not
    choose them. `state` is the
    token state of the encoder that runs, or of the last one that ran inside. `masked` says whether the user gave a
    mask over patches, where the encoder gets one that the model made itself; None: the encoder's own arguments tell.
    `num_tokens` adds up the tokens that the encoders inside have returned. An encoder's own scope is `closed`: models
    that run inside it (a teacher in a hook, say) are not read by the models around it. `sizes` [B, n] are those of the
    tokens that the reader got from the encoder, in this pass or an earlier one; None: each of them counts once.
    """

    reader: str = "tokens"
    state: TokenState | None = None
    masked: bool | None = None
    num_tokens: int = 0
    closed: bool = False
    sizes: Tensor | None = None
    states_read: tuple[int, ...] | None = None


_SCOPE: ContextVar[Scope | None] = ContextVar("dtem_hf_scope", default=None)
# Dynamo cannot read a ContextVar: while it traces, in one thread, the scope is kept here.
_traced: Scope | None = None


def current_scope() -> Scope | None:
    """The innermost scope, None outside of all."""
    return _traced if torch.compiler.is_dynamo_compiling() else _SCOPE.get()


def current_state() -> TokenState | None:
    """The token state of the merged encoder that is running; None where none is, or where it runs unmerged."""
    scope = _traced if torch.compiler.is_dynamo_compiling() else _SCOPE.get()
    return None if scope is None else scope.state


def is_traced() -> bool:
    """Whether a scope is open in the trace that torch.compile is making."""
    return _traced is not None


@contextmanager
def open_scope(scope: Scope) -> Iterator[Scope]:
    """Make a scope the innermost one inside the block."""
    global _traced
    if torch.compiler.is_dynamo_compiling():
        outer, _traced = _traced, scope
        try:
            yield scope
        finally:
            _traced = outer
        return
    token = _SCOPE.set(scope)
    try:
        yield scope
    finally:
        _SCOPE.reset(token)
