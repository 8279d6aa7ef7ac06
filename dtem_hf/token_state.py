"""What travels with the tokens of one forward pass, and what a user may ask to see of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import ops
from .embedding import DecoupledEmbedding
from .errors import UnsupportedModelError


@dataclass
class MergeTrace:
    """What the latest forward pass under `trace_merging()` did, layer by layer.

    `source_maps[i]` [B, N] int64: the position, behind layer i, of the token that every original token ended in.
    `sizes[i]` [B, n_i] float32: how many original tokens each token behind layer i stands for.
    """

    source_maps: list[Tensor] = field(default_factory=list)
    sizes: list[Tensor] = field(default_factory=list)


class TokenState:
    """Token sizes and counts of one forward pass, by layer; made new for every pass and never kept on a module.

    Entry i of a list belongs to the tokens that enter layer i. A layer that is run again (gradient checkpointing)
    reads the entry it read before.
    """

    def __init__(
        self,
        resolve: Callable[[int], Sequence[int]],
        num_prefix_tokens: int,
        embedding: DecoupledEmbedding | None = None,
        trace: MergeTrace | None = None,
        masked: bool = False,
    ) -> None:
        self.num_prefix_tokens = num_prefix_tokens
        self.embedding = embedding
        self._masked = masked
        self._resolve = resolve
        self._reductions: Sequence[int] | None = None
        self._trace = trace
        # None stands for "every token is one patch": then attention needs no bias.
        self._sizes: list[Tensor | None] = [None]
        self._active: list[int] = []

    def sizes(self, layer: int) -> Tensor | None:
        """Sizes of the tokens that enter a layer: [B, n] float32, or None while all are 1."""
        return self._sizes[layer]

    def enter(self, layer: int, num_tokens: int) -> tuple[int, int]:
        """How many of the tokens that enter a layer still take part, and how many of them it merges away."""
        if layer == 0 and not self._active:
            self._active.append(num_tokens)
            self._reductions = self._resolve(num_tokens)
        assert self._reductions is not None
        return self._active[layer], self._reductions[layer]

    def leave(
        self, layer: int, x: Tensor, sizes: Tensor | None, num_active: int, source: Callable[[], Tensor]
    ) -> None:
        """Record what a layer hands on; `source` makes its source map, and is called only if somebody asked."""
        if len(self._sizes) > layer + 1:
            return
        self._sizes.append(sizes)
        self._active.append(num_active)
        if self._trace is not None:
            trace = self._trace
            step = source().detach()
            trace.source_maps.append(ops.compose_source_maps(trace.source_maps[-1], step) if layer else step)
            trace.sizes.append(torch.ones(x.shape[:2], device=x.device) if sizes is None else sizes.detach())

    def attention_bias(
        self, layer: int, dtype: torch.dtype, attention_mask: Tensor | None, wanted: bool
    ) -> Tensor | None:
        """The additive mask for a layer's attention: log sizes [B, 1, 1, n], or the model's own while all are 1."""
        sizes = self._sizes[layer]
        if sizes is None:
            return attention_mask
        if self._masked:
            raise UnsupportedModelError(
                "attention_mask: a mask over patches cannot follow tokens that are merged; leave it out, or use r=0."
            )
        # What the model made itself (when it is exported) lets all tokens see all tokens, and now there are fewer.
        if not wanted:
            return None
        device = sizes.device.type
        return ops.size_bias(sizes, torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype)
