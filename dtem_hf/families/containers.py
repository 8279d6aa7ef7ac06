"""Containers: models around an encoder, and how they read its tokens. Unlisted ones read all tokens, in place."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from transformers.utils.generic import ModelOutput

from ..scope import Scope, open_scope
from .readers import TOKEN_SIZES, ScopedForward, WeighedCrossAttention


class CrossAttendingModel(ScopedForward):
    """A model whose decoder attends to merged tokens; in generation, it gets the tokens with their sizes."""

    def _run_in_scope(self, stock: Callable[[], Any], inputs: dict[str, Any]) -> Any:
        given = inputs.get("encoder_outputs")
        sizes = given.get(TOKEN_SIZES) if isinstance(given, ModelOutput) else None
        if given is not None and sizes is None:
            self._warn_of_lost_sizes(given[0].shape[1])
        with open_scope(Scope(reader="sized", sizes=sizes)):
            return stock()

    def _warn_of_lost_sizes(self: Any, num_tokens: int) -> None:
        merging = next((module.merging for module in self.modules() if "merging" in vars(module)), None)
        if merging is not None and any(merging.plan.reductions) and num_tokens < merging.num_tokens:
            warnings.warn(
                f"encoder_outputs: {num_tokens} tokens without their sizes ({TOKEN_SIZES}), so the decoder counts a "
                "merged token once; hand over the encoder's output as it returns it, not a tuple of it.",
                stacklevel=2,
            )


class PlaceholderCheck(ScopedForward):
    """A model that replaces placeholders by image features; the error for a wrong number says what to do.

    Its scope says which hidden states the model reads in this pass, by an argument or its config.
    """

    scoped = ("get_image_features",)

    def _run_in_scope(self: Any, stock: Callable[[], Any], inputs: dict[str, Any]) -> Any:
        given = [inputs[name] for name in FEATURE_LAYERS if inputs.get(name) is not None]
        with open_scope(Scope(reader="", states_read=states_read(self.config, *given))):
            return stock()

    def get_placeholder_mask(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().get_placeholder_mask(*args, **kwargs)  # type: ignore[misc]
        except ValueError as error:
            raise ValueError(
                f"{error}. The vision tower returns merged tokens (unmerge=False): make prompts with "
                "dtem_hf.AutoProcessor.from_pretrained(..., merge=model), which writes a placeholder for each."
            ) from error


@dataclass(frozen=True)
class Container:
    """How models of a type read the tokens of the encoder inside.

    `reader` is "grid", "tokens", or "sized" (merged tokens with their sizes). `mixins` are for the model itself,
    `parts` for its parts, by name; missing parts are skipped. `counts_placeholders`: the language model can get merged
    tokens (`unmerge=False`) if the prompt has as many placeholders. If it stacks tokens of several layers, tokens of
    an earlier layer are averaged, by size, over the groups that are merged in the last layer that is read.
    `drops_first`: the model drops the CLS token, whatever its config says.
    """

    reader: str = "grid"
    mixins: tuple[type, ...] = ()
    parts: Mapping[str, type] = field(default_factory=dict)
    counts_placeholders: bool = False
    drops_first: bool = False


GRID = Container()
COUNTING = Container("grid", (PlaceholderCheck,), {"model": PlaceholderCheck}, counts_placeholders=True)
# By model type: the tested containers. Any other reads all tokens, in place (GRID).
CONTAINERS: Mapping[str, Container] = {
    **dict.fromkeys(("depth_anything", "dpt", "prompt_depth_anything", "upernet", "vitpose", "zoedepth"), GRID),
    **dict.fromkeys(("aya_vision", "gemma3", "llava_next", "llava_onevision"), GRID),
    **dict.fromkeys(("idefics2", "idefics3", "internvl", "janus", "qwen2_vl", "qwen3_vl", "smolvlm"), GRID),
    **dict.fromkeys(("llava", "paligemma"), COUNTING),
    "vipllava": replace(COUNTING, drops_first=True),
    "vision-encoder-decoder": Container("sized", (CrossAttendingModel,), {"decoder": WeighedCrossAttention}),
    "vision-text-dual-encoder": Container("tokens"),
}

# Other types that hold an encoder, unless their config says otherwise: `register` has to know them.
OTHERS = (
    *("aria", "chmv2", "cohere2_vision", "colmodernvbert", "colpali", "colqwen2", "cosmos3_omni", "deepseek_vl"),
    *("deepseek_vl_hybrid", "depth_pro", "granite4_vision", "lfm2_vl", "llava_next_video", "modernvbert"),
    *("nemotron_h_omni", "pi0", "shieldgemma2", "t5gemma2", "t5gemma2_encoder", "tipsv2_dpt", "ultravbert"),
    "video_llava",
)


def container_of(model_class: Any) -> Container:
    """The `Container` of a model class."""
    return CONTAINERS.get(model_class.config_class.model_type, GRID)


# The names, in a call and in a config, of what says which hidden states are read.
FEATURE_LAYERS = ("vision_feature_layer", "vision_feature_layers")


def states_read(config: Any, *given: Any) -> tuple[int, ...]:
    """Indices of the hidden states that a vision-language model reads; 0 is the first layer's input, -1 the last.

    They are those `given` in a call, or else those of the config.
    """
    layers, *_ = (*given, *(getattr(config, name) for name in FEATURE_LAYERS if hasattr(config, name)), -1)
    return (layers,) if isinstance(layers, int) else tuple(layers)
