"""GIT: a CLIP-like vision tower whose merged tokens go to a captioning decoder.

The decoder's loss and its cached attention mask use `image_patch_tokens`, the number of visual tokens, which
transformers computes from the image size. Here it is the number that the tower returned, over all frames.
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
    """Mixin for `GitModel` and `GitForCausalLM`: their scope holds the number of visual tokens."""

    def _run_in_scope(self, stock: Callable[[], Any], inputs: dict[str, Any]) -> Any:
        outer = current_scope()
        with open_scope(Scope(num_tokens=cached_visual_tokens(inputs))) as scope:
            output = stock()
        if scope.state is not None and scope.state.kept:
            raise UnsupportedModelError(
                f"{type(self).__name__}: dTPS in training keeps pruned tokens, which the decoder would see; use DTEM, "
                "or `.eval()`."
            )
        if outer is not None:
            outer.num_tokens = scope.num_tokens
        return output


def cached_visual_tokens(inputs: Mapping[str, Any]) -> int:
    """The number of visual tokens in the decoder's cache; its mask covers only the text. 0 without a cache."""
    given = {name: value for name, value in inputs.items() if value is not None}
    # The argument is `cache` from transformers 5.24 on, `past_key_values` before.
    cache, text = given.get("cache", given.get("past_key_values")), given.get("input_ids", given.get("inputs_embeds"))
    if "pixel_values" in given or cache is None or text is None or "attention_mask" not in given:
        return 0
    return max(cache.get_seq_length() + text.shape[1] - given["attention_mask"].shape[-1], 0)


class TrueImagePatchTokens:
    """Mixin for the self-attention of the decoder's first layer, whose `image_patch_tokens` transformers reads."""

    @property
    def image_patch_tokens(self) -> int:
        """Visual tokens of the running pass; outside of a pass, those of an unmerged image."""
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
