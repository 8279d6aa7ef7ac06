"""What travels with the tokens of one forward pass, and what a user can ask to see of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .embedding import DecoupledEmbedding
from .errors import MOST_LAYERS, UnsupportedModelError


@dataclass
class MergeTrace:
    """What the latest forward pass under `trace_merging()` did, layer by layer.

    `source_maps[i]` [B, N] int64: the position, behind layer i, of the token that every original token ended in.
    `sizes[i]` [B, n_i] float32: how many original tokens each token behind layer i stands for.
    """

    source_maps: list[Tensor] = field(default_factory=list)
    sizes: list[Tensor] = field(default_factory=list)

    def __repr__(self) -> str:
        tokens = [self.source_maps[0].shape[1] if self.source_maps else 0, *(sizes.shape[1] for sizes in self.sizes)]
        return f"MergeTrace({len(self.sizes)} layers, tokens {' → '.join(map(str, tokens))})"


@dataclass
class MergeStep:
    """What a layer chose its merges from, for training that scores every possible merge.

    Tokens `x` [B, n, D] (their gradient can be asked for), `sizes` [B, n] or None where all are 1, the features that
    they were compared by (`metric`) and their mean attention keys (`keys`) [B, n, d], which of them are `padding`
    [B, n] or None, and how many were merged away.
    """

    x: Tensor
    sizes: Tensor | None
    metric: Tensor
    keys: Tensor
    padding: Tensor | None
    r: int


class TokenState:
    """Token sizes and counts of one forward pass, by layer; made new for every pass and never kept on a module.

    Entry i of a list belongs to the tokens that enter layer i. A layer that is run again (gradient checkpointing)
    reads the entry it read before.

    `method` reduces the tokens and `anatomy` names the parts of a layer; `resolve` maps a number of tokens to one r
    per layer. `sizes` [B, N] are given where the tokens come with padding, which has size 0. With `keep_sources`,
    every layer's source map is kept; `steps` is filled, if it is given. `states_read` are the hidden states, by index,
    that a reader stacks: layers behind the last of them pass their tokens on as they are, and tokens of the others
    are merged as those of the last are.
    """

    def __init__(
        self,
        resolve: Callable[[int], Sequence[int]],
        num_prefix_tokens: int,
        method: Any = None,
        anatomy: Any = None,
        embedding: DecoupledEmbedding | None = None,
        trace: MergeTrace | None = None,
        masked: bool = False,
        sizes: Tensor | None = None,
        keep_sources: bool = False,
        steps: list[MergeStep] | None = None,
        states_read: Sequence[int] | None = None,
    ) -> None:
        self.num_prefix_tokens = num_prefix_tokens
        self.method = method
        self.anatomy = anatomy
        self.embedding = embedding
        # By how much parameters of the backbone move once all tokens are gone.
        self._shifts = {} if embedding is None else embedding.shifts()
        self.steps = steps
        self.layers_read = None if states_read is None else max(states_read)
        self._stacks = set(states_read or ()) - {self.layers_read}
        # Where the latest layer ran.
        self._device: torch.device | None = None
        # The layer that is running, and the key projection that ran in it with what it returned.
        self.layer = 0
        self.projected: tuple[nn.Module, Tensor] | None = None
        # By which keys and queries were rotated in it, in a family that rotates them.
        self.rotation: Any = None
        # Whether the encoder has returned all tokens, each in its place.
        self.unmerged = False
        # Set when the encoder has returned: a layer that runs after that is run again by gradient checkpointing.
        self.finished = False
        # Of packed images: the rows [S, N] of those that have N tokens each, with a state of their own.
        self.parts: list[tuple[Tensor, TokenState]] = []
        self._masked = masked
        self._padded = sizes is not None
        self._resolve = resolve
        self._reductions: Sequence[int] = ()
        self._trace = trace
        self._keep_sources = keep_sources or trace is not None
        # None: every token stands for one patch, and attention needs no bias.
        self._sizes: list[Tensor | None] = [sizes]
        self._active: list[int] = []
        self._positions: list[Tensor | None] = [None]
        # By index, tokens that have entered earlier layers, as the layers since then have merged them.
        self._stacked: list[dict[int, Tensor]] = [{}]
        self._sources: list[Tensor] = []
        # Where pruned tokens stay behind a mask (dTPS in training): by the layer in front of which it was drawn, which
        # tokens are kept, [B, n], 1 or 0 with a gradient.
        self.kept: dict[int, Tensor] = {}
        self._first_merge = MOST_LAYERS  # none so far

    def divide(self, rows: Sequence[Tensor]) -> None:
        """Give packed images of each length a state of their own: `rows` [S, N] are theirs, for each length N."""
        if len(rows) > 1 and (self._trace is not None or self.steps is not None):
            lengths = ", ".join(str(each.shape[1]) for each in rows)
            raise UnsupportedModelError(f"A trace is for images of one number of tokens, and these have {lengths}.")
        common = (self._resolve, self.num_prefix_tokens, self.method, self.anatomy, self.embedding, self._trace)
        self.parts = [(each, TokenState(*common, keep_sources=True, steps=self.steps)) for each in rows]

    def sizes(self, layer: int) -> Tensor | None:
        """Sizes of the tokens that enter a layer: [B, n] float32, or None while all are 1."""
        return self._sizes[layer]

    @property
    def final_sizes(self) -> Tensor | None:
        """Sizes of the tokens that the encoder returns: [B, n] float32, or None where nothing was merged."""
        return self._sizes[-1] if self.changed else None

    def source(self, layer: int) -> Tensor:
        """Where the original tokens are behind a layer (-1: the last), if source maps are kept: int64 [B, N]."""
        return self._sources[layer]

    def padding(self, layer: int) -> Tensor | None:
        """Which tokens that enter a layer stand for nothing: bool [B, n], or None where none can."""
        sizes = self._sizes[layer]
        return sizes.detach() <= 0 if self._padded and sizes is not None else None

    def has_merged(self, layer: int) -> bool:
        """Whether a layer in front of this one has changed the tokens."""
        return self._first_merge < layer

    @property
    def num_tokens(self) -> int:
        """How many tokens entered the first layer."""
        return self._active[0]

    @property
    def num_active(self) -> int:
        """How many of the tokens behind the last layer that has run still take part; they are the first."""
        return self._active[-1]

    def num_active_after(self, layers: int) -> int:
        """How many tokens still take part behind a number of layers."""
        return self._active[min(layers, len(self._active) - 1)]

    @property
    def num_layers(self) -> int:
        """How many layers have run."""
        return len(self._sizes) - 1

    def kept_before(self, layer: int) -> Tensor | None:
        """Which tokens that enter a layer are kept, [B, n]; None where no mask was drawn in front of it."""
        drawn = [index for index in self.kept if index <= layer]
        return self.kept[max(drawn)] if drawn else None

    @property
    def merges_softly(self) -> bool:
        """Whether the encoder has all tokens, and each counts in its own place by what is left of it."""
        sizes = self.final_sizes
        return sizes is not None and sizes.shape[1] == self.num_tokens and not self.kept

    @property
    def changed(self) -> bool:
        """Whether any layer has changed the tokens."""
        return self._first_merge < MOST_LAYERS

    def positions(self, layer: int) -> Tensor | None:
        """Where the tokens that enter a layer lie, as the family counts it: [B, n, k] float32, or None."""
        return self._positions[layer]

    def move_to(self, layer: int, device: torch.device) -> None:
        """Move what belongs to the tokens that enter a layer to their device: layers may lie on several."""
        if device == self._device:
            return
        self._device = device
        lists: list[tuple[Any, int]] = [(self._sizes, layer), (self._positions, layer), (self._sources, layer - 1)]
        for kept, index in lists:
            if 0 <= index < len(kept) and (tensor := kept[index]) is not None and tensor.device != device:
                kept[index] = tensor.to(device)

    def stack(self, layer: int, x: Tensor) -> None:
        """Keep the tokens that enter a layer, if the reader stacks them: x [B, n, D]."""
        if layer in self._stacks:
            self._stacked[layer].setdefault(layer, x)

    @property
    def stacked(self) -> dict[int, Tensor]:
        """By index, the hidden states that the reader stacks under the last: [B, n, D], merged as that one is."""
        return self._stacked[-1]

    def place(self, positions: Tensor) -> None:
        """Set where the tokens of the first layer lie; merged tokens then take the size-weighted mean."""
        self._positions[0] = positions

    def begin_layer(self, layer: int, num_tokens: int) -> tuple[int, int]:
        """How many of the tokens that enter a layer still take part, and how many of them it merges away."""
        if layer == 0 and not self._active:
            self._active.append(num_tokens)
            self._reductions = self._resolve(num_tokens)
        return self._active[layer], self._reductions[layer]

    def record_unchanged(self, layer: int, x: Tensor) -> None:
        """Record that a layer returns all tokens that entered it: x [B, n, D]."""
        if len(self._sizes) == layer + 1:
            self._positions.append(self._positions[layer])
            self._stacked.append(dict(self._stacked[layer]))
            self._record(layer, x, self._sizes[layer], self._active[layer])

    def record_merge(
        self,
        layer: int,
        x: Tensor,
        sizes: Tensor,
        num_active: int,
        source: Callable[[], Tensor],
        carry: Callable[[Tensor], Tensor],
        kept: Tensor | None = None,
    ) -> None:
        """Record what a layer returns: x [B, n', D], sizes [B, n'], of which `num_active` tokens still take part.

        `source` makes its source map, and is called only if it is kept; `carry` merges positions and stacked tokens as
        the layer merged its own. Where pruned tokens stay, `kept` [B, n'] is 0 for them, and 1 for all others.
        """
        positions = self._positions[layer]
        # Also when the layer is run again: gradient checkpointing wants the same operations both times.
        carried = None if positions is None else carry(positions)
        stacked = {index: carry(tokens.to(x.device)) for index, tokens in self._stacked[layer].items()}
        if len(self._sizes) > layer + 1:
            return
        self._first_merge = min(self._first_merge, layer)
        if kept is not None:
            self.kept[layer + 1] = kept
        self._record(layer, x, sizes, num_active, source)
        self._positions.append(carried)
        self._stacked.append(stacked)

    def _record(
        self, layer: int, x: Tensor, sizes: Tensor | None, num_active: int, source: Callable[[], Tensor] | None = None
    ) -> None:
        self._sizes.append(sizes)
        self._active.append(num_active)
        if self._keep_sources:
            if source is None:
                step = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
            else:
                step = source().detach()
            self._sources.append(ops.compose_source_maps(self._sources[-1], step) if layer else step)
        if self._trace is not None:
            self._trace.source_maps.append(self._sources[-1])
            self._trace.sizes.append(torch.ones(x.shape[:2], device=x.device) if sizes is None else sizes.detach())

    def attention_bias(
        self, layer: int, dtype: torch.dtype, attention_mask: Tensor | None, wanted: bool, by_query: bool = True
    ) -> Tensor | None:
        """The additive mask for a layer's attention: log sizes [B, 1, 1, n], or the model's own before any merge.

        Where sizes are not `wanted`, only padding is left out. Where pruned tokens stay, they are left out, too, and
        each token sees itself, [B, 1, n, n], unless the queries are others than the tokens (not `by_query`).
        """
        sizes = self._sizes[layer]
        if sizes is None or self._first_merge >= layer:
            return attention_mask
        if self._masked:
            raise UnsupportedModelError(
                "attention_mask: a mask over patches cannot follow tokens that are merged; leave it out, or use r=0."
            )
        # An exported model makes a mask in which all tokens see all tokens, which no longer fits their number.
        kept = self.kept_before(layer) if self.kept else None
        if not wanted and not self._padded and kept is None:
            return None
        dtype = ops.attention_dtype(dtype, sizes.device.type)
        exponents = None
        # A pooling head behind the last layer has no exponents.
        if wanted and self.embedding is not None and layer < self.embedding.shape.num_layers:
            exponents = self.embedding.exponents_of(layer)
            exponents = None if exponents is None else exponents.to(sizes.device)
        counted = sizes if wanted else (sizes > 0).float() if kept is None else kept.to(sizes.device)
        bias = ops.size_bias(counted, dtype, exponents)
        if self._padded and not sizes.requires_grad:  # as the model itself masks it; a gradient needs the exact floor
            bias = bias.masked_fill((sizes <= 0)[:, None, None, :], torch.finfo(bias.dtype).min)
        return ops.see_itself(bias, counted) if kept is not None and by_query else bias

    def shifted(self, key: str, parameter: Tensor) -> Tensor:
        """A parameter of the backbone, moved by the share of the tokens that are gone behind the running layer.

        In the first layer it stays; behind the last one, it is moved as in the last layer. It stays where packed
        images run together, as they do until a layer merges.
        """
        shift = self._shifts.get(key)
        if shift is None or self.layer == 0 or self.parts:
            return parameter
        gone = 1 - (self._active[self.layer] - self._reductions[self.layer]) / self._active[0]
        return torch.add(parameter, shift.to(parameter), alpha=gone) if gone else parameter

    def final_bias(self, dtype: torch.dtype) -> Tensor | None:
        """The additive mask for attention over the tokens that the encoder returns; None where none is needed."""
        return self.attention_bias(len(self._sizes) - 1, dtype, None, wanted=True, by_query=False)
