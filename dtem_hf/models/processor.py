"""transformers' AutoProcessor with `merge=`: it writes as many image placeholders as a merged model needs."""

from __future__ import annotations

from typing import Any

import transformers

from ..errors import BadValue
from ..families.containers import container_of
from .derived import DerivedMixin, derived_class
from .encoder import Merging
from .install import inside_peft, is_merged, merging_of


class AutoProcessor(transformers.AutoProcessor):
    """`transformers.AutoProcessor` with `merge=`."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, merge: Any = None, **kwargs: Any) -> Any:
        """Load a processor that makes prompts for `merge`, a merged vision-language model; None: for the plain model.

        The processor asks the model at every call, so it stays valid after `set_reduction`. A pickled processor, as
        workers get it, makes prompts for the model of that time. Raises ValueError for a model that is not merged, or
        that does not count placeholders.
        """
        processor = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        if merge is None:
            return processor
        model = inside_peft(merge)
        if not (is_merged(model) and container_of(type(model)).counts_placeholders):
            raise BadValue("merge", type(model).__name__, "a merged vision-language model such as LLaVA or PaliGemma")
        processor.__class__ = derived_class(type(processor), MergedPlaceholders)  # type: ignore[arg-type]
        processor.reading = Reading(model)
        return processor


class Reading:
    """How many tokens of an image a vision-language model gives its language model, as it is merged at each call.

    A pickled reading holds no model, and stays as it was.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._merging: Merging | None = None
        self._dropped = 0

    def count(self, num_plain: int) -> int:
        """How many tokens of an image the language model gets, if that of the plain model gets `num_plain`."""
        self._ask()
        if self._merging is None or self._merging.unmerge:
            return num_plain
        # Behind the last layer that is read, the number stays.
        return self._merging.plan_for(num_plain + self._dropped).tokens[-1] - self._dropped

    def _ask(self) -> None:
        if self._model is not None:
            self._merging = merging_of(self._model) if is_merged(self._model) else None
            self._dropped = count_dropped_tokens(self._model)

    def __deepcopy__(self, memo: Any) -> Reading:
        return self

    def __getstate__(self) -> dict[str, Any]:
        self._ask()
        return {**vars(self), "_model": None}


class MergedPlaceholders(DerivedMixin):
    """Mixin for a processor: it writes one placeholder per token that a model gives its language model."""

    reading: Reading
    image_token: str

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """The placeholders of one image: those of the plain model, but fewer."""
        text: str = super().replace_image_token(image_inputs, image_idx, **kwargs)  # type: ignore[misc]
        return self.image_token * self.reading.count(text.count(self.image_token))

    def _get_num_multimodal_tokens(self, *args: Any, **kwargs: Any) -> Any:
        data = super()._get_num_multimodal_tokens(*args, **kwargs)  # type: ignore[misc]
        if data.num_image_tokens is not None:
            counts = [self.reading.count(count) for count in data.num_image_tokens]
            data = type(data)(num_image_tokens=counts, num_image_patches=data.num_image_patches)
        return data


def count_dropped_tokens(model: Any) -> int:
    """How many of the encoder's tokens a vision-language model leaves out: 1 for the CLS token, or 0."""
    by_config = getattr(model.config, "vision_feature_select_strategy", None) == "default"
    return int(by_config or container_of(type(model)).drops_first)
