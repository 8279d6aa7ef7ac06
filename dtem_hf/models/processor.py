"""transformers' AutoProcessor with `merge=`: it writes as many image placeholders as a merged model needs."""

from __future__ import annotations

from typing import Any

import transformers

from ..errors import BadValue
from ..families.containers import container_of
from .install import is_merged, merging_of


class AutoProcessor(transformers.AutoProcessor):
    """`transformers.AutoProcessor` with `merge=`."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, merge: Any = None, **kwargs: Any) -> Any:
        """Load a processor that makes prompts for `merge`, a merged vision-language model; None: for the plain model.

        The processor asks the model at every call, so it stays valid after `set_reduction`. Raises ValueError for a
        model that is not merged, or that does not count placeholders.
        """
        processor = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        if merge is None:
            return processor
        if not (is_merged(merge) and container_of(type(merge)).counts_placeholders):
            raise BadValue("merge", type(merge).__name__, "a merged vision-language model such as LLaVA or PaliGemma")
        stock = type(processor)
        # On the class: save_pretrained would save an attribute of the processor itself.
        processor.__class__ = type(stock.__name__, (MergedPlaceholders, stock), {"merged_model": merge})
        return processor


class MergedPlaceholders:
    """Mixin for a processor: it writes one placeholder per token that `merged_model` returns for an image."""

    merged_model: Any
    image_token: str

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """The placeholders of one image: those of the plain model, but fewer."""
        text: str = super().replace_image_token(image_inputs, image_idx, **kwargs)  # type: ignore[misc]
        return self.image_token * count_placeholders(self.merged_model, text.count(self.image_token))

    def _get_num_multimodal_tokens(self, *args: Any, **kwargs: Any) -> Any:
        data = super()._get_num_multimodal_tokens(*args, **kwargs)  # type: ignore[misc]
        if data.num_image_tokens is not None:
            counts = [count_placeholders(self.merged_model, count) for count in data.num_image_tokens]
            data = type(data)(num_image_tokens=counts, num_image_patches=data.num_image_patches)
        return data


def count_placeholders(model: Any, num_plain: int) -> int:
    """How many tokens of an image a merged model gives its language model, if the plain model gives `num_plain`."""
    merging = merging_of(model)
    if merging.unmerge:
        return num_plain
    dropped = count_dropped_tokens(model)
    tokens = merging.plan_for(num_plain + dropped).tokens  # behind the last layer that is read, the number stays
    return tokens[-1] - dropped


def count_dropped_tokens(model: Any) -> int:
    """How many of the encoder's tokens a vision-language model leaves out: 1 for the CLS token, or 0."""
    by_config = getattr(model.config, "vision_feature_select_strategy", None) == "default"
    return int(by_config or container_of(type(model)).drops_first)
