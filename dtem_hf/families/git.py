"""GIT: a CLIP-like vision tower whose merged tokens go to a captioning decoder as they are.

The decoder's loss and its cached attention mask read the number of visual tokens off `image_patch_tokens`, which the
stock model computes from the size of an image; here it is what the tower has really handed on, frame by frame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from transformers.models.git.modeling_git import GitForCausalLM, GitModel, GitVisionModel

from ..scope import Scope, current_scope, open_scope
from .clip import CLIPLike
from .readers import ScopedForward


class CountsVisualTokens(ScopedForward):
    """Mixed into `GitModel` and `GitForCausalLM`: while they run, it is known how many visual tokens there are."""

    def _run_in_scope(self, stock: Callable[[], Any], inputs: dict[str, Any]) -> Any:
        outer = current_scope()
        with open_scope(Scope(num_tokens=cached_visual_tokens(inputs), drops=True)) as scope:
            output = stock()
        if outer is not None:
            outer.num_tokens = scope.num_tokens
        return output


def cached_visual_tokens(inputs: Mapping[str, Any]) -> int:
    """Visual tokens in a decoder's cache: its mask covers the text alone. 0 where there is nothing to tell it from."""
    # Its name from transformers 5.24 on, and before.
    caches = (inputs.get(name) for name in ("cache", "past_key_values"))
    cache, mask = next((c for c in caches if c is not None), None), inputs.get("attention_mask")
    text = inputs.get("input_ids") if inputs.get("input_ids") is not None else inputs.get("inputs_embeds")
    if inputs.get("pixel_values") is not None or cache is None or mask is None or text is None:
        return 0
    return max(cache.get_seq_length() + text.shape[1] - mask.shape[-1], 0)


class TrueImagePatchTokens:
    """Mixed into the decoder layer's self-attention that the stock model asks."""

    @property
    def image_patch_tokens(self) -> int:
        """Visual tokens of the pass that is running; outside of one, those of an unmerged image."""
        scope = current_scope()
        return scope.num_tokens if scope is not None and scope.num_tokens else self.__dict__["image_patch_tokens"]


class GitFamily(CLIPLike):
    encoder_class = GitVisionModel
    models = {
        "AutoModel": (GitModel,),
        "AutoModelForCausalLM": (GitForCausalLM,),
        "AutoModelForImageTextToText": (GitForCausalLM,),
    }
    other_models = (GitVisionModel,)
    composites = (GitModel, GitForCausalLM)

    def layers(self, encoder: Any) -> Sequence[nn.Module]:
        return encoder.vision_model.encoder.layers

    def model_mixins(self, model_class: type) -> tuple[type, ...]:
        return (CountsVisualTokens,) if issubclass(model_class, self.composites) else ()

    def readers(self, model: Any, encoder: nn.Module) -> Iterator[tuple[nn.Module, type]]:
        if isinstance(model, GitForCausalLM):
            yield model.git, CountsVisualTokens
        if isinstance(model, self.composites):
            decoder: Any = model.git if isinstance(model, GitForCausalLM) else model
            yield decoder.encoder.layer[0].attention.self, TrueImagePatchTokens

    def frames(self, model: Any) -> int:
        return (isinstance(model, self.composites) and model.config.num_image_with_embedding) or 1
