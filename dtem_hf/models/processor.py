"""transformers' AutoProcessor with `merge=`: it writes as many image placeholders as a merged model needs."""

from __future__ import annotations

import copyreg
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import transformers

from ..errors import BadValue
from ..families.containers import container_of
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
        # On the class: save_pretrained would save an attribute of the processor itself.
        processor.__class__ = _asking_class(type(processor), partial(Reading.of, model))
        return processor


@dataclass(frozen=True)
class Reading:
    """How many tokens of an image a vision-language model gives its language model."""

    merging: Merging | None
    dropped: int

    @classmethod
    def of(cls, model: Any) -> Reading:
        """The reading of a model as it is merged now."""
        return cls(merging_of(model) if is_merged(model) else None, count_dropped_tokens(model))

    def count(self, num_plain: int) -> int:
        """How many tokens of an image the language model gets, if that of the plain model gets `num_plain`."""
        if self.merging is None or self.merging.unmerge:
            return num_plain
        # Behind the last layer that is read, the number stays.
        return self.merging.plan_for(num_plain + self.dropped).tokens[-1] - self.dropped


class MergedPlaceholders:
    """Mixin for a processor: it writes one placeholder per token that a model gives its language model."""

    reading: Callable[[], Reading]
    image_token: str

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """The placeholders of one image: those of the plain model, but fewer."""
        text: str = super().replace_image_token(image_inputs, image_idx, **kwargs)  # type: ignore[misc]
        return self.image_token * self.reading().count(text.count(self.image_token))

    def _get_num_multimodal_tokens(self, *args: Any, **kwargs: Any) -> Any:
        data = super()._get_num_multimodal_tokens(*args, **kwargs)  # type: ignore[misc]
        if data.num_image_tokens is not None:
            counts = [self.reading().count(count) for count in data.num_image_tokens]
            data = type(data)(num_image_tokens=counts, num_image_patches=data.num_image_patches)
        return data


class _AskingClass(type):
    """The metaclass of processors that ask a model: no module holds these classes, so `copyreg` pickles them by it."""

    reading: Callable[[], Reading]


def _asking_class(stock: type, reading: Callable[[], Reading]) -> _AskingClass:
    return _AskingClass(stock.__name__, (MergedPlaceholders, stock), {"reading": staticmethod(reading)})


def _unpickled_class(stock: type, reading: Reading) -> _AskingClass:
    return _asking_class(stock, lambda: reading)


copyreg.pickle(_AskingClass, lambda cls: (_unpickled_class, (cls.__bases__[1], cls.reading())))


def count_dropped_tokens(model: Any) -> int:
    """How many of the encoder's tokens a vision-language model leaves out: 1 for the CLS token, or 0."""
    by_config = getattr(model.config, "vision_feature_select_strategy", None) == "default"
    return int(by_config or container_of(type(model)).drops_first)
