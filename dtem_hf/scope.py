"""Scopes share data between the modules of one forward pass, without state on a module or changed signatures.

A merged encoder opens a scope with its token state. Its layers, and the heads that read its tokens, use the innermost
scope. A scope belongs to one thread and one call: nested models and other threads never see it.
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

    `reader` says how the model that opened the scope reads the encoder's tokens (see `families.readers`); "": as the
    encoder's merging says. `states_read` are the indices of the hidden states that it reads; None: it does not choose
    them. `state` is the token state of the running encoder, or of the last encoder that ran inside. `masked`: the user
    gave a mask of patches. A model sets it if it always makes a mask for the encoder; None: the encoder's arguments
    decide. `num_tokens` is the sum of the tokens that the encoders inside returned. An encoder's own scope is
    `closed`: models outside do not read a model that runs inside it (a teacher in a hook, say). `sizes` [B, n] are
    the sizes of the tokens that the reader got, in this pass or an earlier one; None: each token counts once.
    """

    reader: str = "tokens"
    state: TokenState | None = None
    masked: bool | None = None
    num_tokens: int = 0
    closed: bool = False
    sizes: Tensor | None = None
    states_read: tuple[int, ...] | None = None


_SCOPE: ContextVar[Scope | None] = ContextVar("dtem_hf_scope", default=None)
# Dynamo cannot read a ContextVar. While it traces, in one thread, this variable holds the scope.
_traced: Scope | None = None
# One entry for each open block of any thread that changes passes (`pass_options`). Dynamo cannot read the ContextVar
# with the changes, but it compares the length of a list before it runs what it has compiled.
CHANGING_BLOCKS: list[None] = []


def current_scope() -> Scope | None:
    """The innermost scope; None outside of all scopes."""
    return _traced if torch.compiler.is_dynamo_compiling() else _SCOPE.get()


def current_state() -> TokenState | None:
    """The token state of the running merged encoder; None if no encoder runs, or if it runs unmerged."""
    scope = _traced if torch.compiler.is_dynamo_compiling() else _SCOPE.get()
    return None if scope is None else scope.state


def is_traced() -> bool:
    """Whether a scope is open in torch.compile's current trace."""
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
