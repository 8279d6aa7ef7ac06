"""GIT: a CLIP-like vision tower whose merged tokens go to a captioning decoder.

The decoder's loss and its cached attention mask read the number of visual tokens off `image_patch_tokens`, which the
stock model computes from the size of an image. Here it is the number that the tower has returned, frame by frame.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers.models.git.modeling_git import GitForCausalLM, GitModel, GitVisionModel

from ..errors import UnsupportedModelError
from ..scope import Scope, current_scope, open_scope
from .clip import CLIP_LAYER
from .family import Family
from .readers import ScopedForward


class CountsVisualTokens(ScopedForward):
    """Mixed into `GitModel` and `GitForCausalLM`: their scope holds the number of visual tokens."""

    def _run_in_scope(self, stock: Callable[[], Any], inputs: dict[str, Any]) -> Any:
        outer = current_scope()
        with open_scope(Scope(num_tokens=cached_visual_tokens(inputs))) as scope:
            output = stock()
        if scope.state is not None and scope.state.kept:
            raise UnsupportedModelError(
                f"{type(self).__name__}: dTPS learns while pruned tokens stay, and the decoder sees all tokens alike; "
                "use DTEM, or `.eval()`."
            )
        if outer is not None:
            outer.num_tokens = scope.num_tokens
        return output


def cached_visual_tokens(inputs: Mapping[str, Any]) -> int:
    """Visual tokens in a decoder's cache, whose mask covers the text alone; 0 where there is no cache."""
    given = {name: value for name, value in inputs.items() if value is not None}
    # Called `cache` from transformers 5.24 on, and `past_key_values` before.
    cache, text = given.get("cache", given.get("past_key_values")), given.get("input_ids", given.get("inputs_embeds"))
    if "pixel_values" in given or cache is None or text is None or "attention_mask" not in given:
        return 0
    return max(cache.get_seq_length() + text.shape[1] - given["attention_mask"].shape[-1], 0)


class TrueImagePatchTokens:
    """Mixed into the decoder layer's self-attention that the stock model asks for the number."""

    @property
    def image_patch_tokens(self) -> int:
        """Visual tokens of the pass that is running; outside of one, those of an unmerged image."""
        scope = current_scope()
        return scope.num_tokens if scope is not None and scope.num_tokens else self.__dict__["image_patch_tokens"]


FAMILY = Family(
    encoders={GitVisionModel: "vision_model.encoder.layers"},
    anatomy=CLIP_LAYER,
    models={GitModel: CountsVisualTokens, GitForCausalLM: CountsVisualTokens, GitVisionModel: "tokens"},
    composites=(GitModel, GitForCausalLM),
    frames="num_image_with_embedding",
    model_parts={
        "git": CountsVisualTokens,
        "git.encoder.layer.0.attention.self": TrueImagePatchTokens,
        "encoder.layer.0.attention.self": TrueImagePatchTokens,
    },
)
