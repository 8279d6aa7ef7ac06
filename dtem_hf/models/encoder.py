"""What a merged encoder does in a forward pass: a token state for every pass, and what a user asked of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from ..configuration import MergeConfig
from ..embedding import DecoupledEmbedding
from ..errors import UnsupportedModelError
from ..families import Backbone, check_attention_implementation
from ..families.readers import ScopedForward, finish_output, is_watched
from ..methods import Reducer, make_reducer
from ..schedule import EncoderCost, MergePlan
from ..scope import Scope, current_scope, open_scope
from ..token_state import MergeStep, MergeTrace, TokenState
from .derived import Renamed


# What transformers records of a forward pass if it is asked to.
_RECORDED = ("hidden_states", "attentions")


@dataclass(frozen=True)
class PassOptions:
    """What a user asked of the forward passes inside a `with` block."""

    merge: bool = True
    trace: MergeTrace | None = None
    steps: list[MergeStep] | None = None


# Keyed by the identity of an encoder: threads, and models inside models, do not see each other's options.
_PASS_OPTIONS: ContextVar[Mapping[int, PassOptions]] = ContextVar("dtem_hf_pass_options", default=MappingProxyType({}))


@contextmanager
def pass_options(encoder: nn.Module, **changes: Any) -> Iterator[None]:
    """Inside the block, and in this thread only, passes of an encoder get other options."""
    current = _PASS_OPTIONS.get()
    changed = replace(current.get(id(encoder), PassOptions()), **changes)
    token = _PASS_OPTIONS.set({**current, id(encoder): changed})
    try:
        yield
    finally:
        _PASS_OPTIONS.reset(token)


class Merging:
    """How an encoder is merged: config, reducer, costs and the plan for images of the model's own size."""

    def __init__(self, model: nn.Module, encoder: nn.Module, backbone: Backbone, config: MergeConfig) -> None:
        self.config = config
        self.backbone = backbone
        self.unmerge = config.unmerge or isinstance(model, backbone.dense)
        self.reducer: Reducer[Any] = make_reducer(config, backbone)
        self.reducer.check(encoder)
        self.cost: EncoderCost = self.reducer.encoder_cost(model, encoder)
        self.plan: MergePlan = self.plan_for(backbone.num_tokens(encoder))

    def plan_for(self, num_tokens: int) -> MergePlan:
        """Raises ValueError where the config's r does not fit the encoder."""
        return self.cost.plan(num_tokens, self.config.schedule.resolve(self.cost, num_tokens))

    def reductions(self, num_tokens: int) -> Sequence[int]:
        """One r per layer for an image of `num_tokens` tokens."""
        return self.plan.reductions if num_tokens == self.plan.num_tokens else self.plan_for(num_tokens).reductions


class EncoderMerging(Renamed, ScopedForward):
    """Mixed into the encoder: every pass gets a token state, and the learned embedding is filled by its method."""

    merging: Merging | None = None

    def _run_in_scope(self, stock: Callable[[], Any], inputs: dict[str, Any]) -> Any:
        outer = current_scope()
        unmerge = self.merging is not None and (self.merging.unmerge or (outer is not None and outer.unmerges))
        masked = inputs.get("attention_mask") is not None if outer is None or outer.masked is None else outer.masked
        prefix_only = outer is not None and outer.reads_prefix and not unmerge and self._is_unwatched(inputs)
        state = self._new_token_state(inputs, unmerge, masked, prefix_only)
        with open_scope(Scope(state, closed=True)):
            output = stock()
        if state is not None and state.changed:
            wishes = Scope() if outer is None else outer
            output = finish_output(output, state, unmerge, average=wishes.averages, drop=wishes.drops)
        if outer is not None and not outer.closed:
            outer.state, outer.unmerged = state, unmerge
            outer.num_tokens += output[0].shape[1]
        return output

    def _is_unwatched(self: Any, inputs: dict[str, Any]) -> bool:
        """Whether nobody but the model around sees what the last layer hands on."""
        if self.merging is None:
            return False
        last = self.merging.backbone.layers(self)[-1]
        # What is learned softly has a gradient in every layer, if only of 0: DDP would miss it.
        if self.merging.reducer.sizes_carry_gradient(last):
            return False
        if any(inputs.get(f"output_{name}") or getattr(self.config, f"output_{name}", False) for name in _RECORDED):
            return False
        return not is_watched([self, *self.children(), *last.modules()])

    def _new_token_state(
        self, inputs: dict[str, Any], keep_sources: bool, masked: bool, prefix_only: bool = False
    ) -> TokenState | None:
        merging = self.merging
        # Dynamo cannot read a ContextVar: a compiled model is always merged and never traced.
        options = None if torch.compiler.is_compiling() else _PASS_OPTIONS.get().get(id(self))
        if merging is None or (options is not None and not options.merge):
            return None
        check_attention_implementation(self.config._attn_implementation)  # type: ignore[attr-defined]
        self._check_checkpointing(merging)
        trace = None if options is None else options.trace
        if trace is not None:
            trace.source_maps.clear()
            trace.sizes.clear()
        return TokenState(
            merging.reductions,
            merging.cost.num_prefix_tokens,
            embedding_of(self),
            trace,
            masked=masked,
            sizes=merging.backbone.padding_sizes(self, inputs),  # type: ignore[arg-type]
            keep_sources=keep_sources,
            steps=None if options is None else options.steps,
            prefix_only=prefix_only,
        )

    def _check_checkpointing(self, merging: Merging) -> None:
        """Reentrant checkpointing differentiates a layer's first output only, and would lose what sizes carry."""
        layer: Any = merging.backbone.layers(self)[0]  # type: ignore[arg-type]
        if getattr(layer, "gradient_checkpointing", False) and merging.reducer.sizes_carry_gradient(layer):
            options = getattr(layer._gradient_checkpointing_func, "keywords", {})
            if layer.training and options.get("use_reentrant"):
                raise UnsupportedModelError(
                    "gradient_checkpointing_kwargs: use_reentrant=True loses the gradient of token sizes; "
                    "use_reentrant=False, transformers' default, keeps it."
                )

    def _init_weights(self, module: nn.Module) -> None:
        if not isinstance(module, DecoupledEmbedding):
            super()._init_weights(module)  # type: ignore[misc]
        elif self.merging is not None and not all(
            getattr(p, "_is_hf_initialized", False) for p in module.parameters()
        ):
            # Weights that a device map leaves on disk are out of reach until the model is ready.
            module.is_filled = not _has_offloaded_keys(self.merging.backbone, self)
            if module.is_filled:
                self.merging.reducer.initialize(module, self)  # type: ignore[arg-type]


def embedding_of(encoder: Any) -> Any:
    """The learned embedding of a merged encoder, None where its method learns nothing."""
    return getattr(encoder, "merge_embedding", None)


def _has_offloaded_keys(backbone: Backbone, encoder: Any) -> bool:
    return any(backbone.key_projection(layer).weight.is_meta for layer in backbone.layers(encoder))
