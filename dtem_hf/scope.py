"""What the modules of one forward pass know of each other, without state on a module or a word in their signatures.

A merged encoder opens a scope with its token state; its layers, and the heads that read its tokens, ask for the
innermost one. A scope belongs to a thread and a call: nested models and two threads never see each other's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from .token_state import TokenState


T = TypeVar("T")


class PassVariable(Generic[T]):
    """A ContextVar; a plain attribute while Dynamo, which cannot read one, traces."""

    def __init__(self, name: str) -> None:
        self._variable: ContextVar[T | None] = ContextVar(name, default=None)
        self._traced: T | None = None

    def get(self) -> T | None:
        """The innermost value, None outside."""
        return self._traced if torch.compiler.is_dynamo_compiling() else self._variable.get()

    def set(self, value: T | None) -> Any:
        """Returns what `reset` takes."""
        if torch.compiler.is_dynamo_compiling():
            before, self._traced = self._traced, value
            return before
        return self._variable.set(value)

    def reset(self, before: Any) -> None:
        """Go back to what was there before `set`."""
        if isinstance(before, Token):
            self._variable.reset(before)
        else:
            self._traced = before


@dataclass
class Scope:
    """`state` is the token state of the encoder that is running, or of the last one that ran inside.

    `averages`, `unmerges`, `reads_prefix` and `drops` are wishes of an outer model to the encoder inside: it averages
    its tokens, needs all of them in place, reads none but the prefix tokens, or reads all alike, so that those that
    were softly merged away must not reach it. `masked` says whether that model was given a mask over patches, where it
    hands the encoder one that it made itself; None where the encoder's own arguments say so. `num_tokens` adds up what
    the encoders inside have handed on, and `unmerged` says that it was with all tokens back in place. A `closed` scope
    is an encoder's own: what runs inside (a teacher in a hook, say) has no say in it.
    """

    state: TokenState | None = None
    averages: bool = False
    unmerges: bool = False
    reads_prefix: bool = False
    drops: bool = False
    masked: bool | None = None
    num_tokens: int = 0
    unmerged: bool = False
    closed: bool = False


_SCOPE: PassVariable[Scope] = PassVariable("dtem_hf_scope")
_LAYER: PassVariable[tuple[TokenState, int]] = PassVariable("dtem_hf_layer")


def current_scope() -> Scope | None:
    """The innermost scope, None outside of all."""
    return _SCOPE.get()


def current_state() -> TokenState | None:
    """The token state of the merged encoder that is running; None where none is, or where it runs unmerged."""
    scope = _SCOPE.get()
    return None if scope is None else scope.state


def current_layer() -> tuple[TokenState, int] | None:
    """The token state and the index of the layer whose attention is running."""
    return _LAYER.get()


@contextmanager
def open_scope(scope: Scope) -> Iterator[Scope]:
    """Make a scope the innermost one inside the block."""
    before = _SCOPE.set(scope)
    try:
        yield scope
    finally:
        _SCOPE.reset(before)


@contextmanager
def open_layer(state: TokenState, index: int) -> Iterator[None]:
    """Tell the parts of a layer's attention which layer they are in."""
    before = _LAYER.set((state, index))
    try:
        yield
    finally:
        _LAYER.reset(before)
