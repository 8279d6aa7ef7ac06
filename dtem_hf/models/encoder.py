"""The forward pass of a merged encoder: it makes a token state for every pass, and follows the user's options."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from ..costs import EncoderCost, MergePlan
from ..errors import BadValue, UnsupportedModelError
from ..families.family import Family
from ..families.readers import MEANS, RETURN_ALL, TOKEN_SIZES, ScopedForward, output_for_reader, read_sizes, with_last
from ..families.unmasked_attention import enable_size_bias
from ..methods import Method
from ..scope import CHANGING_BLOCKS, Scope, current_scope, open_scope
from ..token_state import TokenState
from .derived import DerivedMixin


# The changes of all open blocks, the outermost first, by the identity of an encoder. Other threads, and models inside
# models, do not see them.
_PASS_OPTIONS: ContextVar[Mapping[int, tuple[dict[str, Any], ...]]] = ContextVar(
    "dtem_hf_pass_options", default=MappingProxyType({})
)


@contextmanager
def pass_options(encoder: nn.Module, **changes: Any) -> Iterator[None]:
    """Change options of an encoder's passes, inside the block and in this thread only.

    `merge`: False for plain passes. `trace`: a `MergeTrace` that every pass fills anew. `steps`: a list that gets
    every layer's `MergeStep`. `states`: a list that gets every pass's `TokenState`. An asyncio task that was created
    inside the block has the options, too, until the block ends.
    """
    current = _PASS_OPTIONS.get()
    token = _PASS_OPTIONS.set({**current, id(encoder): (*current.get(id(encoder), ()), changes)})
    CHANGING_BLOCKS.append(None)
    try:
        yield
    finally:
        CHANGING_BLOCKS.pop()
        changes.clear()  # the task's copy of the variable holds the same dict
        _PASS_OPTIONS.reset(token)


def _options_of(encoder: nn.Module) -> dict[str, Any]:
    """The options of the pass that begins."""
    changes: dict[str, Any] = {}
    if not torch.compiler.is_dynamo_compiling():  # Dynamo cannot read a ContextVar: see `CHANGING_BLOCKS`
        for block in _PASS_OPTIONS.get().get(id(encoder), ()):
            changes |= block
    return changes


@dataclass(frozen=True)
class Merging:
    """How an encoder is merged: method, costs, and the plan for images of the model's own size, `num_tokens`.

    `reader` says how the model reads the encoder's tokens, if no model of the encoder's family around it says so.
    `reads_all`: it reads all tokens in place. `states_read` are the indices of the hidden states that are read (0: the
    input of the first layer); layers behind the last of them return their input. `set_reduction` changes the
    method's config and the plan only.
    """

    family: Family
    method: Method
    cost: EncoderCost
    num_tokens: int
    reads_all: bool
    reader: str
    states_read: tuple[int, ...]
    plan: MergePlan = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "plan", self.plan_for(self.num_tokens))

    @property
    def config(self) -> Any:
        """The method's config."""
        return self.method.config

    @property
    def unmerge(self) -> bool:
        """Whether the encoder returns all tokens, in place."""
        return self.reads_all or bool(self.config.unmerge)

    def check_states(self, asked: Sequence[int]) -> None:
        """Raise ValueError for hidden states that are not those which the merging was prepared for."""
        last = self.method.geometry.num_layers
        if self.reader == "sized" and {x + last + 1 if x < 0 else x for x in asked} != set(self.states_read):
            settled = ", ".join(str(x - last - 1) for x in self.states_read)
            expected = f"{settled}, for which it was merged with unmerge=False; set it in the config and attach again"
            raise BadValue("vision_feature_layer", asked[0] if len(asked) == 1 else list(asked), expected)

    def plan_for(self, num_tokens: int) -> MergePlan:
        """The plan for images of `num_tokens` tokens. Raises ValueError if the config's r does not fit the encoder."""
        reductions = self.config.schedule.resolve(self.cost, num_tokens)
        last = max(self.states_read)
        return self.cost.plan(num_tokens, [*reductions[:last], *[0] * (self.method.geometry.num_layers - last)])

    def reductions(self, num_tokens: int) -> Sequence[int]:
        """One r per layer for an image of `num_tokens` tokens."""
        return self.plan.reductions if num_tokens == self.num_tokens else self.plan_for(num_tokens).reductions


class EncoderMerging(DerivedMixin, ScopedForward):
    """Mixin for the encoder: every pass gets a new token state."""

    merging: Merging

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Save the model; also an encoder that was merged inside another model, whose config alone has the record."""
        config: Any = self.config  # type: ignore[attr-defined]
        inside = not hasattr(config, "merge")
        if inside:
            merge = replace(self.merging.config, part=None, unmerge=self.merging.unmerge or None)
            config.merge = merge.to_dict()
        try:
            return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]
        finally:
            if inside:
                del config.merge

    def _run_in_scope(self, stock: Callable[[], Any], inputs: dict[str, Any]) -> Any:
        outer = current_scope()
        wanted = Scope(reader="") if outer is None or outer.closed else outer
        wanted.reader = wanted.reader or self.merging.reader
        # If pruned tokens stay, a weighted mean leaves them out; other readers get their hosts in their places.
        in_place = wanted.reader not in MEANS if self._masks_tokens else wanted.reader in RETURN_ALL
        unmerge = self.merging.unmerge or in_place
        masked = inputs.get("attention_mask") is not None if wanted.masked is None else wanted.masked
        state = self._new_token_state(inputs, unmerge or wanted.reader == "masks", masked)
        if state is not None and wanted.states_read is not None:
            self.merging.check_states(wanted.states_read)
        with open_scope(Scope(state=state, closed=True)):
            output = stock()
        wanted.sizes = None
        if state is not None:
            state.finish(self.merging.method.geometry.num_layers)
            if state.changed:
                output = output_for_reader(output, state, wanted.reader, unmerge)
                wanted.sizes = read_sizes(state, wanted.reader, unmerge)
                if self.merging.reader == "sized" and wanted.sizes is not None and isinstance(output, dict):
                    output[TOKEN_SIZES] = wanted.sizes
            output = self._reaching_all(output, state)
        wanted.state = state
        wanted.num_tokens += output[0].shape[1]
        return output

    @property
    def _masks_tokens(self) -> bool:
        merging: Merging = self.merging
        return merging.method.masks_tokens(merging.family.layers(self)[0].training)  # type: ignore[arg-type]

    def _reaching_all(self: Any, output: Any, state: TokenState) -> Any:
        """In training, make the output depend on all learned parameters, also in layers that merge nothing."""
        if not (self.training and torch.is_grad_enabled() and state.embedding is not None):
            return output
        zero = state.embedding.zero()
        if zero is None:
            return output
        if isinstance(output, dict) and output.get("hidden_states") is not None:  # some models read only these
            states = output["hidden_states"]
            output["hidden_states"] = tuple(x if x is None else x + zero.to(x) for x in states)
        if isinstance(output, dict) and output.get("pooler_output") is not None:
            output["pooler_output"] = output["pooler_output"] + zero.to(output["pooler_output"])
        return with_last(output, output[0] + zero.to(output[0]))

    def _new_token_state(self, inputs: dict[str, Any], keep_sources: bool, masked: bool) -> TokenState | None:
        merging = self.merging
        options = _options_of(self)  # type: ignore[arg-type]
        if not options.get("merge", True):
            return None
        enable_size_bias(self.config._attn_implementation)  # type: ignore[attr-defined]
        self._check_checkpointing()
        if (trace := options.get("trace")) is not None:
            trace.source_maps.clear()
            trace.sizes.clear()
        state = TokenState(
            merging.reductions,
            merging.method.geometry.num_prefix_tokens,
            merging.method,
            merging.family.anatomy,
            embedding_of(self),
            trace,
            masked=masked,
            sizes=merging.family.padding_sizes(inputs),
            keep_sources=keep_sources,
            states_read=merging.states_read,
            steps=options.get("steps"),
        )
        if (states := options.get("states")) is not None:
            states.append(state)
        return state

    def _check_checkpointing(self) -> None:
        """Refuse gradient checkpointing that loses the gradient of sizes, or draws other tokens when a layer reruns.

        Reentrant checkpointing differentiates only the first output of a layer.
        """
        layer: Any = self.merging.family.layers(self)[0]  # type: ignore[arg-type]
        if not (getattr(layer, "gradient_checkpointing", False) and layer.training):
            return
        keywords = getattr(layer._gradient_checkpointing_func, "keywords", {})
        if keywords.get("use_reentrant") and self.merging.method.sizes_carry_gradient(True):
            raise UnsupportedModelError(
                "gradient_checkpointing_kwargs: use_reentrant=True loses the gradient of token sizes; "
                "use_reentrant=False, transformers' default, keeps it."
            )
        if keywords.get("preserve_rng_state") is False and self._masks_tokens:
            raise UnsupportedModelError(
                "gradient_checkpointing_kwargs: preserve_rng_state=False would draw other tokens in the backward pass."
            )


def embedding_of(encoder: Any) -> Any:
    """The learned embedding of a merged encoder; None if its method learns nothing.

    If PEFT's `modules_to_save` wraps it, this is the active copy.
    """
    embedding = getattr(encoder, "merge_embedding", None)
    copies = getattr(embedding, "modules_to_save", None)
    if embedding is None or copies is None:
        return embedding
    active = [] if embedding.disable_adapters else [name for name in embedding.active_adapters if name in copies]
    return copies[active[0]] if active else embedding.original_module
