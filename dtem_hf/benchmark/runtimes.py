"""Peers, the user's functions that a benchmark measures beside its models, and room for compiled graphs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..deploy.graph import ImageGraph
from ..deploy.runtimes import Run
from ..errors import BadValue
from ..programs.functions import load_function


@contextmanager
def room_for_graphs(count: int) -> Iterator[None]:
    """Let torch.compile keep `count` graphs of the same code, and as many for batches of one image."""
    with torch._dynamo.config.patch(
        recompile_limit=max(2 * count, torch._dynamo.config.recompile_limit),
        accumulated_recompile_limit=max(2 * count, torch._dynamo.config.accumulated_recompile_limit),
    ):
        yield


def peer_run(name: str, model: nn.Module, r: Any) -> Run:
    """Call a peer, `module:function`, with a plain model and an r; it returns a callable of pixels [B, C, H, W].

    The model is in eval mode, on the benchmark's device and in its dtype. Raises ValueError if the result is not
    callable.
    """
    run = load_function("peer", name)(model, r)
    if not callable(run):
        raise BadValue("peer", name, f"a function that returns a callable, not {type(run).__name__}")
    return run


class PeerGraph(ImageGraph):
    """A peer's callable as a module that can be exported; `model` is the model that the peer was called with."""

    def __init__(self, model: nn.Module, run: Run) -> None:
        super().__init__(model)
        self._run = run

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        return (self._run(pixel_values),)
