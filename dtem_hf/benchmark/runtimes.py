"""What a benchmark runs beside its models: functions that the user names, and room for compiled graphs."""

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
    """Let torch.compile keep so many graphs of the same code: each row has one, and another for a batch of one."""
    with torch._dynamo.config.patch(
        recompile_limit=max(2 * count, torch._dynamo.config.recompile_limit),
        accumulated_recompile_limit=max(2 * count, torch._dynamo.config.accumulated_recompile_limit),
    ):
        yield


def peer_run(name: str, model: nn.Module, r: Any) -> Run:
    """What a peer, `module:function`, returns for a plain model and an r: a callable of pixels [B, C, H, W].

    The model is in eval mode, on the device and in the dtype that are measured. Raises ValueError where what the
    function returns is not callable.
    """
    run = load_function("peer", name)(model, r)
    if not callable(run):
        raise BadValue("peer", name, f"a function that returns a callable, not {type(run).__name__}")
    return run


class PeerGraph(ImageGraph):
    """What a peer runs on pixels, as a module that can be exported; `model` is the model that it was made of."""

    def __init__(self, model: nn.Module, run: Run) -> None:
        super().__init__(model)
        self._run = run

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        return (self._run(pixel_values),)
