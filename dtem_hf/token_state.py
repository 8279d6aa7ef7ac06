"""The state of the tokens in one forward pass: sizes, source maps, positions; and the trace of it for users."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from . import ops
from .embedding import DecoupledEmbedding
from .errors import MOST_LAYERS, UnsupportedModelError


@dataclass
class MergeTrace:
    """The merges of the latest forward pass under `trace_merging()`, layer by layer.

    `source_maps[i]` [B, N] int64: for every original token, the position behind layer i of the token that holds it.
    `sizes[i]` [B, n_i] float32: how many original tokens each token behind layer i stands for.
    """

    source_maps: list[Tensor] = field(default_factory=list)
    sizes: list[Tensor] = field(default_factory=list)

    def __repr__(self) -> str:
        tokens = [self.source_maps[0].shape[1] if self.source_maps else 0, *(sizes.shape[1] for sizes in self.sizes)]
        return f"MergeTrace({len(self.sizes)} layers, tokens {' → '.join(map(str, tokens))})"


@dataclass
class MergeStep:
    """The inputs of one layer's merge, for training that scores every possible merge.

    `x` [B, n, D] are the tokens (they require a gradient), `sizes` [B, n] or None if all are 1. `metric` [B, n, d] are
    the features that tokens are compared by, `keys` [B, n, d] the mean attention keys. `padding` [B, n] marks padding,
    None if there is none. The layer merged r tokens away.
    """

    x: Tensor
    sizes: Tensor | None
    metric: Tensor
    keys: Tensor
    padding: Tensor | None
    r: int


class TokenState:
    """Token sizes and counts of one forward pass, by layer. Every pass makes a new one; no module keeps it.

    Entry i of a list belongs to the tokens that enter layer i. A layer that runs again (gradient checkpointing) reads
    the same entry as before.

    `method` reduces the tokens, `anatomy` names the parts of a layer, and `resolve` maps a number of tokens to one r
    per layer. `sizes` [B, N] are given if the input has padding, which has size 0. `keep_sources` keeps the source map
    of every layer. `steps`, if given, gets a `MergeStep` of every merging layer. `states_read` are the indices of the
    hidden states that a reader stacks. Layers behind the last of them return their tokens unchanged; earlier states
    are merged in the same way as the last one.
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
        # Learned shifts of the backbone's parameters, at full strength (all tokens merged away).
        self._shifts = {} if embedding is None else embedding.shifts()
        self.steps = steps
        self.layers_read = None if states_read is None else max(states_read)
        self._stacks = set(states_read or ()) - {self.layers_read}
        # The device of the latest layer.
        self._device: torch.device | None = None
        # The index of the running layer, and its key projection with the output.
        self.layer = 0
        self.projected: tuple[nn.Module, Tensor] | None = None
        # The rotation of the layer's queries and keys, in a family with rotary positions.
        self.rotation: Any = None
        # Whether the encoder returned all tokens, each in its place.
        self.unmerged = False
        # Set when the encoder has returned. Gradient checkpointing runs layers again after that.
        self.finished = False
        # For packed images: for each number of tokens N, the rows [S, N] of the images with N tokens, and their state.
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
        # Hidden states of earlier layers by index, merged along with the tokens since.
        self._stacked: list[dict[int, Tensor]] = [{}]
        self._sources: list[Tensor] = []
        # For dTPS in training, where pruned tokens stay behind a mask: the keep masks [B, n], 1 or 0 with a gradient,
        # by the layer in front of which they were drawn.
        self.kept: dict[int, Tensor] = {}
        self._first_merge = MOST_LAYERS  # none so far

    def divide(self, rows: Sequence[Tensor]) -> None:
        """Make one state for the packed images of each length N; `rows` holds their rows [S, N] for each length."""
        if len(rows) > 1 and (self._trace is not None or self.steps is not None):
            lengths = ", ".join(str(each.shape[1]) for each in rows)
            raise UnsupportedModelError(
                f"A trace needs images with the same number of tokens; these have {lengths} tokens."
            )
        common = (self._resolve, self.num_prefix_tokens, self.method, self.anatomy, self.embedding, self._trace)
        self.parts = [(each, TokenState(*common, keep_sources=True, steps=self.steps)) for each in rows]

    def sizes(self, layer: int) -> Tensor | None:
        """Sizes of the tokens that enter a layer: [B, n] float32, or None while all are 1."""
        return self._sizes[layer]

    @property
    def final_sizes(self) -> Tensor | None:
        """Sizes of the tokens behind the last layer: [B, n] float32, or None if nothing was merged."""
        return self._sizes[-1] if self.changed else None

    def source(self, layer: int) -> Tensor:
        """The source map behind a layer (-1: the last): int64 [B, N]. Only if source maps are kept."""
        return self._sources[layer]

    def padding(self, layer: int) -> Tensor | None:
        """Which of the tokens that enter a layer are padding: bool [B, n], or None if the input has none."""
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
        """How many tokens are still active behind the latest layer; they are the first of its output."""
        return self._active[-1]

    def num_active_after(self, layers: int) -> int:
        """How many tokens are still active behind a number of layers."""
        return self._active[min(layers, len(self._active) - 1)]

    @property
    def num_layers(self) -> int:
        """How many layers have run."""
        return self.parts[0][1].num_layers if self.parts else len(self._sizes) - 1

    def kept_before(self, layer: int) -> Tensor | None:
        """The keep mask [B, n] of the tokens that enter a layer; None if no mask was drawn in front of it."""
        drawn = [index for index in self.kept if index <= layer]
        return self.kept[max(drawn)] if drawn else None

    @property
    def merges_softly(self) -> bool:
        """Whether the merges were soft: all tokens stay, and each counts by the size that it has left."""
        sizes = self.final_sizes
        return sizes is not None and sizes.shape[1] == self.num_tokens and not self.kept

    @property
    def changed(self) -> bool:
        """Whether any layer has changed the tokens."""
        return self._first_merge < MOST_LAYERS

    def positions(self, layer: int) -> Tensor | None:
        """Positions of the tokens that enter a layer, in the family's coordinates: [B, n, k] float32, or None."""
        return self._positions[layer]

    def enter(self, layer: int, x: Tensor) -> None:
        """Begin a layer with its tokens x [B, n, D]. Raises UnsupportedModelError if another layer should be next."""
        if not self.finished and layer != self.num_layers:
            self._stop_at_change()
        if x.device != self._device:
            self.move_to(layer, x.device)
        self.layer = layer
        if layer in self._stacks:  # the reader stacks these tokens
            self._stacked[layer].setdefault(layer, x)

    def finish(self, num_layers: int) -> None:
        """End the pass of the encoder's layers. Raises UnsupportedModelError if not all have run."""
        if num_layers != self.num_layers:
            self._stop_at_change()
        self.finished = True

    def _stop_at_change(self) -> NoReturn:
        raise UnsupportedModelError(
            f"Layer {self.num_layers} of the merged encoder did not run: layers were replaced, removed or reordered "
            "after attach. Attach again: attach(model, config), or to keep what it has learned "
            "attach(model, model.to_merge_adapter())."
        )

    def move_to(self, layer: int, device: torch.device) -> None:
        """Move sizes, positions and source map of the tokens that enter a layer to the layer's device."""
        if device == self._device:
            return
        self._device = device
        lists: list[tuple[Any, int]] = [(self._sizes, layer), (self._positions, layer), (self._sources, layer - 1)]
        for kept, index in lists:
            if 0 <= index < len(kept) and (tensor := kept[index]) is not None and tensor.device != device:
                kept[index] = tensor.to(device)

    @property
    def stacked(self) -> dict[int, Tensor]:
        """The earlier hidden states that the reader stacks, by index: [B, n, D], merged like the last one."""
        return self._stacked[-1]

    def place(self, positions: Tensor) -> None:
        """Set the positions of the first layer's tokens; a merged token gets the size-weighted mean."""
        self._positions[0] = positions

    def begin_layer(self, layer: int, num_tokens: int) -> tuple[int, int]:
        """The number of active tokens that enter a layer, and the layer's r."""
        if layer == 0 and not self._active:
            self._active.append(num_tokens)
            self._reductions = self._resolve(num_tokens)
        return self._active[layer], self._reductions[layer]

    def record_unchanged(self, layer: int, x: Tensor) -> None:
        """Record that a layer merged nothing: x [B, n, D]."""
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
        """Record a layer's merge: its output x [B, n', D] and sizes [B, n'], of which `num_active` tokens are active.

        `source` makes the layer's source map; it is called only if source maps are kept. `carry` merges positions and
        stacked tokens as the layer merged its tokens. If pruned tokens stay, `kept` [B, n'] is 0 for them, else 1.
        """
        positions = self._positions[layer]
        # Also when the layer runs again: gradient checkpointing needs the same operations both times.
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
        """The additive mask for a layer's attention: log sizes [B, 1, 1, n], or the model's own mask before any merge.

        If sizes are not `wanted`, the mask hides padding only. If pruned tokens stay, it hides them, too, and each
        token sees itself: [B, 1, n, n]. Without `by_query`, queries are not the tokens, and it stays [B, 1, 1, n].
        """
        sizes = self._sizes[layer]
        if sizes is None or self._first_merge >= layer:
            return attention_mask
        if self._masked:
            raise UnsupportedModelError(
                "attention_mask: a mask over patches cannot follow tokens that are merged; leave it out, or use r=0."
            )
        # An exported model makes a mask in which all tokens see all tokens; behind a merge its shape does not fit.
        kept = self.kept_before(layer) if self.kept else None
        if not wanted and not self._padded and kept is None:
            return None
        dtype = ops.attention_dtype(dtype, sizes.device.type)
        exponents = None
        # A pooling head behind the last layer has no exponents.
        if wanted and self.embedding is not None and layer < len(self.embedding.exponents):
            exponents = self.embedding.exponents[layer]().to(sizes.device)
        counted = sizes if wanted else (sizes > 0).float() if kept is None else kept.to(sizes.device)
        bias = ops.size_bias(counted, dtype, exponents)
        # The model masks padding by the smallest number, too. A gradient needs the floor of `size_bias` instead.
        if self._padded and not sizes.requires_grad:
            bias = bias.masked_fill((sizes <= 0)[:, None, None, :], torch.finfo(bias.dtype).min)
        return ops.see_itself(bias, counted) if kept is not None and by_query else bias

    def shifted(self, key: str, parameter: Tensor) -> Tensor:
        """A backbone parameter plus its learned shift, times the share of tokens merged away behind the running layer.

        The first layer does not shift; modules behind the last layer shift as in the last layer. No parameter shifts
        while packed images run together, which they do until a layer merges.
        """
        shift = self._shifts.get(key)
        if shift is None or self.layer == 0 or self.parts:
            return parameter
        merged_share = 1 - (self._active[self.layer] - self._reductions[self.layer]) / self._active[0]
        return torch.add(parameter, shift.to(parameter), alpha=merged_share) if merged_share else parameter

    def final_bias(self, dtype: torch.dtype) -> Tensor | None:
        """The additive mask for attention over the encoder's output tokens; None if none is needed."""
        return self.attention_bias(len(self._sizes) - 1, dtype, None, wanted=True, by_query=False)
