"""transformers' Auto classes with `merge=`, under the same names; `register` gives it to transformers' own."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import transformers
from packaging.version import Version
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.auto_factory import _get_model_class

from ..errors import AdapterError
from ..families import FAMILIES, check_attention_implementation, unsupported
from ..hub.adapter import MergeAdapter
from .attach import ADAPTER_ARGUMENTS, UNSET, attach, merged_class
from .derived import stock_class
from .install import MergeLike, resolve_merge


_HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)


class MergingAutoClass:
    """Mixed into an Auto class of transformers: the same, plus `merge`."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, merge: MergeLike = UNSET, **kwargs: Any
    ) -> Any:
        """transformers' own, plus `merge`: a config, an adapter, its Hub id or folder; None for the plain model.

        Left out, the checkpoint decides: one that was saved merged comes back merged, with its learned embedding.
        """
        stock = super().from_pretrained  # type: ignore[misc]
        # Read before the backbone, which is the larger download.
        if not isinstance(merge, MergeAdapter) and merge is not UNSET:
            options = {name: kwargs[name] for name in ADAPTER_ARGUMENTS if name in kwargs}
            config, adapter = resolve_merge(merge, **options)
            merge = adapter or config
        config = kwargs.get("config")
        if not isinstance(config, PretrainedConfig):
            options = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
            with _adapters_named(cls.__name__, pretrained_model_name_or_path, **options):
                config = AutoConfig.from_pretrained(pretrained_model_name_or_path, **options)
        if (merge is UNSET and getattr(config, "merge", None) is None) or (
            merge is None and not hasattr(config, "merge")
        ):
            return stock(pretrained_model_name_or_path, *model_args, **kwargs)
        if merge is not None:
            check_attention_implementation(kwargs.get("attn_implementation"))
        model_class: Any = merged_class(cls._model_class(config))
        return model_class.from_pretrained(pretrained_model_name_or_path, *model_args, merge=merge, **kwargs)

    @classmethod
    def from_config(cls, config: PretrainedConfig, merge: MergeLike = UNSET, **kwargs: Any) -> Any:
        """A model with random weights, merged by `merge` or else by `config.merge`."""
        wanted = getattr(config, "merge", None) if merge is UNSET else merge
        plain = copy.deepcopy(config)
        if hasattr(plain, "merge"):
            del plain.merge
        return attach(super().from_config(plain, **kwargs), wanted)  # type: ignore[misc]

    @classmethod
    def _model_class(cls, config: PretrainedConfig) -> type:
        mapping = cls._model_mapping  # type: ignore[attr-defined]
        if type(config) in mapping:
            model_class: type = _get_model_class(config, mapping)
            if issubclass(model_class, _SUPPORTED):
                return model_class
        raise unsupported(f"{cls.__name__} for model type {config.model_type!r}")


_SUPPORTED = tuple(cls for family in FAMILIES for cls in family.models)


class AutoBackbone(MergingAutoClass, transformers.AutoBackbone):
    """`transformers.AutoBackbone` with `merge=`."""


class AutoModel(MergingAutoClass, transformers.AutoModel):
    """`transformers.AutoModel` with `merge=`."""


class AutoModelForCausalLM(MergingAutoClass, transformers.AutoModelForCausalLM):
    """`transformers.AutoModelForCausalLM` with `merge=`."""


class AutoModelForImageClassification(MergingAutoClass, transformers.AutoModelForImageClassification):
    """`transformers.AutoModelForImageClassification` with `merge=`."""


class AutoModelForAudioClassification(MergingAutoClass, transformers.AutoModelForAudioClassification):
    """`transformers.AutoModelForAudioClassification` with `merge=`."""


class AutoModelForVideoClassification(MergingAutoClass, transformers.AutoModelForVideoClassification):
    """`transformers.AutoModelForVideoClassification` with `merge=`."""


class AutoModelForZeroShotObjectDetection(MergingAutoClass, transformers.AutoModelForZeroShotObjectDetection):
    """`transformers.AutoModelForZeroShotObjectDetection` with `merge=`."""


class AutoModelForDepthEstimation(MergingAutoClass, transformers.AutoModelForDepthEstimation):
    """`transformers.AutoModelForDepthEstimation` with `merge=`."""


class AutoModelForPreTraining(MergingAutoClass, transformers.AutoModelForPreTraining):
    """`transformers.AutoModelForPreTraining` with `merge=`."""


class AutoModelForSemanticSegmentation(MergingAutoClass, transformers.AutoModelForSemanticSegmentation):
    """`transformers.AutoModelForSemanticSegmentation` with `merge=`."""


class AutoModelForVisualQuestionAnswering(MergingAutoClass, transformers.AutoModelForVisualQuestionAnswering):
    """`transformers.AutoModelForVisualQuestionAnswering` with `merge=`."""


class AutoModelForImageTextToText(MergingAutoClass, transformers.AutoModelForImageTextToText):
    """`transformers.AutoModelForImageTextToText` with `merge=`."""


class AutoModelForZeroShotImageClassification(MergingAutoClass, transformers.AutoModelForZeroShotImageClassification):
    """`transformers.AutoModelForZeroShotImageClassification` with `merge=`."""


@contextmanager
def _adapters_named(auto_name: str, name: Any, revision: str | None = None, **options: Any) -> Iterator[None]:
    """Say of an adapter that was given as a model what it is, and what it is for."""
    try:
        yield
    except (OSError, ValueError) as error:
        pinned = f"{name}@{revision}" if revision and not os.path.isdir(name) else name
        try:
            adapter = MergeAdapter.from_reference(
                pinned, **{key: value for key, value in options.items() if key in ADAPTER_ARGUMENTS}
            )
        except (OSError, ValueError):
            raise error from None
        base_model = adapter.backbone.base_model or "the backbone"
        raise AdapterError(
            f"{name} is a merge adapter for {base_model} ({adapter.backbone.model_type}) and no model: "
            f"{auto_name}.from_pretrained({base_model!r}, merge={str(pinned)!r})."
        ) from error


# For a checkpoint that several Auto classes can read, the first of these is chosen.
_BY_PREFERENCE = (
    AutoModelForImageClassification,
    AutoModelForZeroShotImageClassification,
    AutoModelForImageTextToText,
    AutoModelForSemanticSegmentation,
    AutoModelForVisualQuestionAnswering,
    AutoModelForCausalLM,
    AutoModelForAudioClassification,
    AutoModelForVideoClassification,
    AutoModelForZeroShotObjectDetection,
    AutoModelForDepthEstimation,
    AutoBackbone,
    AutoModelForPreTraining,
    AutoModel,
)


def _mapped_classes(auto: Any, config_class: Any) -> tuple[Any, ...]:
    """The model classes that an Auto class has for a config, if any of them can be merged."""
    classes = auto._model_mapping.get(config_class, ())
    classes = classes if isinstance(classes, (list, tuple)) else (classes,)
    return tuple(classes) if any(issubclass(cls, _SUPPORTED) for cls in classes) else ()


def auto_class(config: PretrainedConfig) -> Any:
    """The Auto class for the model that a checkpoint was saved as, or else for one that its config can be read as.

    Raises UnsupportedModelError where none of them can be merged.
    """
    offered = [
        (auto, cls.__name__)
        for auto in _BY_PREFERENCE
        for cls in _mapped_classes(auto, type(config))
        if issubclass(cls, _SUPPORTED)
    ]
    if not offered:
        raise unsupported(f"A model of type {config.model_type!r}")
    saved = [auto for auto, name in offered if name in (config.architectures or ())]
    return (saved or [auto for auto, _ in offered])[0]


def register() -> None:
    """Make transformers' own Auto classes (and so `pipeline(..., model_kwargs={"merge": ...})`) accept `merge=`.

    For a checkpoint that was saved merged they take a folder, a Hub id, `config.to_dict()` or None, as they write what
    they are given into a config that is printed as JSON.

    Opt-in and idempotent; `unregister` undoes it.
    """
    _register(merged_class)


def unregister() -> None:
    """Give transformers' Auto classes their own model classes back."""
    _register(lambda model_class: stock_class(model_class))


def _register(variant: Callable[[type], type]) -> None:
    """Of several classes for a config, transformers takes the one that `config.architectures` names, or the first."""
    for auto in _BY_PREFERENCE:
        stock = getattr(transformers, auto.__name__)
        for config_class in {cls.config_class for cls in _SUPPORTED}:  # type: ignore[attr-defined]
            classes = _mapped_classes(stock, config_class)
            if classes:
                chosen = tuple(variant(cls) if issubclass(cls, _SUPPORTED) else cls for cls in classes)
                stock.register(_key(config_class), chosen[0] if len(chosen) == 1 else chosen, exist_ok=True)


class _OwnKey:
    """Stands for a config class of transformers in the table that `register` fills: equal to it, but not of its own.

    Before 5.19, it quietly leaves out those that are.
    """

    def __init__(self, config_class: type) -> None:
        self._config_class = config_class
        self.__name__ = config_class.__name__
        self.__module__ = __name__

    def __hash__(self) -> int:
        return hash(self._config_class)

    def __eq__(self, other: object) -> bool:
        return other is self._config_class or (
            isinstance(other, _OwnKey) and other._config_class is self._config_class
        )


def _key(config_class: type) -> Any:
    return config_class if Version(transformers.__version__) >= Version("5.19") else _OwnKey(config_class)
