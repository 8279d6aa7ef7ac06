"""transformers' AutoProcessor with `merge=`: prompts with as many image placeholders as a merged model needs."""

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
        """transformers' own, plus `merge`: the merged vision-language model that prompts are for; None: a plain one.

        The processor asks the model at every call: `set_reduction` needs no new one. A pickled one, as workers get it,
        writes prompts for the model as it was then. Raises ValueError for a model that counts no placeholders, or is
        not merged.
        """
        processor = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        if merge is None:
            return processor
        model = inside_peft(merge)
        if not (is_merged(model) and container_of(type(model)).counts_placeholders):
            raise BadValue("merge", type(model).__name__, "a merged vision-language model such as LLaVA or PaliGemma")
        # On the class: what lies on a processor itself is saved with it.
        processor.__class__ = _asking(type(processor), partial(Reading.of, model))
        return processor


@dataclass(frozen=True)
class Reading:
    """How a vision-language model reads its images: as it is merged, if it is, without the tokens that it drops."""

    merging: Merging | None
    dropped: int

    @classmethod
    def of(cls, model: Any) -> Reading:
        """How a model reads them now."""
        return cls(merging_of(model) if is_merged(model) else None, count_dropped(model))

    def count(self, num_plain: int) -> int:
        """How many tokens of an image its language model gets, where that of a plain one gets `num_plain`."""
        if self.merging is None or self.merging.unmerge:
            return num_plain
        # Behind the last layer that is read, they stay as many.
        return self.merging.plan_for(num_plain + self.dropped).tokens[-1] - self.dropped


class MergedPlaceholders:
    """Mixed into a processor: an image becomes as many placeholders as a model hands on tokens for it."""

    reading: Callable[[], Reading]
    image_token: str

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """The placeholders of one image, as the processor itself writes them for a plain model, but fewer."""
        text: str = super().replace_image_token(image_inputs, image_idx, **kwargs)  # type: ignore[misc]
        return self.image_token * self.reading().count(text.count(self.image_token))

    def _get_num_multimodal_tokens(self, *args: Any, **kwargs: Any) -> Any:
        data = super()._get_num_multimodal_tokens(*args, **kwargs)  # type: ignore[misc]
        if data.num_image_tokens is not None:
            counts = [self.reading().count(count) for count in data.num_image_tokens]
            data = type(data)(num_image_tokens=counts, num_image_patches=data.num_image_patches)
        return data


class _Asking(type):
    """Of the classes of processors that ask a model: no module holds them, and so this says how they are pickled."""

    reading: Callable[[], Reading]


def _asking(stock: type, reading: Callable[[], Reading]) -> _Asking:
    return _Asking(stock.__name__, (MergedPlaceholders, stock), {"reading": staticmethod(reading)})


def _unpickled(stock: type, reading: Reading) -> _Asking:
    return _asking(stock, lambda: reading)


copyreg.pickle(_Asking, lambda cls: (_unpickled, (cls.__bases__[1], cls.reading())))


def count_dropped(model: Any) -> int:
    """How many of the encoder's tokens a vision-language model leaves out: its CLS token, or none."""
    by_config = getattr(model.config, "vision_feature_select_strategy", None) == "default"
    return int(by_config or container_of(type(model)).drops_first)
