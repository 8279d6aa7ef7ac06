"""transformers' Auto classes with `merge=`, under the same names; `register` adds `merge=` to transformers' own."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import transformers
from packaging.version import Version
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.auto_factory import _get_model_class
from transformers.utils.import_utils import is_peft_available
from transformers.utils.peft_utils import find_adapter_config_file

from ..errors import AdapterError, BadValue, NoTrainedHead, UnsupportedModelError
from ..families import SUPPORTED, find_place, unsupported
from ..families.containers import CONTAINERS, OTHERS
from ..files import read_json
from ..hub.adapter import MergeAdapter
from .attach import ADAPTER_ARGUMENTS, UNSET, attach, merged_class
from .derived import stock_class
from .install import MergeLike, resolve_merge


_FILE_ARGUMENTS = (*ADAPTER_ARGUMENTS, "proxies", "revision", "subfolder")
_HUB_ARGUMENTS = (*_FILE_ARGUMENTS, "trust_remote_code")


class MergingAutoClass:
    """Mixin that adds `merge` to an Auto class of transformers."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, merge: MergeLike = UNSET, **kwargs: Any
    ) -> Any:
        """Load a model, merged by `merge`: a config, an adapter, its Hub id or folder; None for the plain model.

        Without `merge`, the checkpoint decides: a model that was saved merged is merged again, with its learned
        embedding. All other arguments are those of transformers.
        """
        stock = super().from_pretrained  # type: ignore[misc]
        # Before the backbone, which is the larger download: a wrong reference fails early.
        if merge is not UNSET:
            given, adapter = resolve_merge(merge, **_chosen(kwargs, ADAPTER_ARGUMENTS))
            merge = adapter or given
        config = kwargs.get("config")
        if not isinstance(config, PretrainedConfig):
            options = _chosen(kwargs, _HUB_ARGUMENTS)
            with _adapters_named(cls.__name__, pretrained_model_name_or_path, **options):
                config = _config_of(pretrained_model_name_or_path, **options)
        if merge in (UNSET, None) and not _is_recorded(config, merge is UNSET):
            return stock(pretrained_model_name_or_path, *model_args, **kwargs)
        model_class: Any = merged_class(cls._model_class(config))
        return model_class.from_pretrained(pretrained_model_name_or_path, *model_args, merge=merge, **kwargs)

    @classmethod
    def from_config(cls, config: PretrainedConfig, merge: MergeLike = UNSET, **kwargs: Any) -> Any:
        """A model with random weights, merged by `merge`, or without `merge` by `config.merge`."""
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
            if issubclass(model_class, SUPPORTED) or _holds_encoder(config):
                return model_class
        elif isinstance(config, _CONFIGS) or _holds_encoder(config):
            raise UnsupportedModelError(
                f"{cls.__name__} has no model of type {config.model_type!r}; {auto_class(config).__name__} has."
            )
        raise unsupported(f"{cls.__name__} for model type {config.model_type!r}", config.model_type)


def _config_of(name: Any, **options: Any) -> PretrainedConfig:
    """The config of a model; of a PEFT adapter that of its base model, which transformers loads with it."""
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(name, **options)
        return config
    except (OSError, ValueError):
        found = find_adapter_config_file(name, **_chosen(options, _FILE_ARGUMENTS)) if is_peft_available() else None
        base_name = found and read_json(found).get("base_model_name_or_path")
        if not base_name:
            raise
        base: PretrainedConfig = AutoConfig.from_pretrained(base_name, **options)
        return base


def _chosen(arguments: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """The given arguments among `names`."""
    return {name: arguments[name] for name in names if name in arguments}


def _parts(config: PretrainedConfig) -> list[PretrainedConfig]:
    """The configs inside a config."""
    return [value for value in vars(config).values() if isinstance(value, PretrainedConfig)]


def _is_recorded(config: PretrainedConfig, with_value: bool) -> bool:
    """Whether a config records a merge, of the model or of a part; `with_value` ignores records of None."""
    here = getattr(config, "merge", None) is not None if with_value else hasattr(config, "merge")
    return here or any(_is_recorded(part, with_value) for part in _parts(config))


def _holds_encoder(config: PretrainedConfig) -> bool:
    """Whether a config contains, at any depth, the config of a model that can be merged."""
    return any(isinstance(part, _CONFIGS) or _holds_encoder(part) for part in _parts(config))


_CONFIGS = tuple({cls.config_class for cls in SUPPORTED})  # type: ignore[attr-defined]


# If several Auto classes can read a checkpoint, the first in this list is chosen.
_BY_PREFERENCE: list[Any] = []


def _merging(name: str) -> Any:
    """Make the `merge=` version of an Auto class of transformers; `auto_class` prefers those made first."""
    content = {"__module__": __name__, "__doc__": f"`transformers.{name}` with `merge=`."}
    _BY_PREFERENCE.append(type(name, (MergingAutoClass, getattr(transformers, name)), content))
    return _BY_PREFERENCE[-1]


AutoModelForImageClassification = _merging("AutoModelForImageClassification")
AutoModelForZeroShotImageClassification = _merging("AutoModelForZeroShotImageClassification")
AutoModelForImageTextToText = _merging("AutoModelForImageTextToText")
AutoModelForSemanticSegmentation = _merging("AutoModelForSemanticSegmentation")
AutoModelForDepthEstimation = _merging("AutoModelForDepthEstimation")
AutoModelForVideoClassification = _merging("AutoModelForVideoClassification")
AutoModelForAudioClassification = _merging("AutoModelForAudioClassification")
AutoModelForZeroShotObjectDetection = _merging("AutoModelForZeroShotObjectDetection")
AutoModelForObjectDetection = _merging("AutoModelForObjectDetection")
AutoModelForKeypointDetection = _merging("AutoModelForKeypointDetection")
AutoModelForPoseEstimation = _merging("AutoModelForPoseEstimation")
AutoModelForNormalEstimation = _merging("AutoModelForNormalEstimation")
AutoModelForImageMatting = _merging("AutoModelForImageMatting")
AutoModelForUniversalSegmentation = _merging("AutoModelForUniversalSegmentation")
AutoModelForInstanceSegmentation = _merging("AutoModelForInstanceSegmentation")
AutoModelForImageSegmentation = _merging("AutoModelForImageSegmentation")
AutoModelForVisualQuestionAnswering = _merging("AutoModelForVisualQuestionAnswering")
AutoModelForMultimodalLM = _merging("AutoModelForMultimodalLM")
AutoModelForCausalLM = _merging("AutoModelForCausalLM")
AutoModelForSequenceClassification = _merging("AutoModelForSequenceClassification")
AutoModelForTokenClassification = _merging("AutoModelForTokenClassification")
AutoModelForMaskedLM = _merging("AutoModelForMaskedLM")
AutoModelForSeq2SeqLM = _merging("AutoModelForSeq2SeqLM")
AutoModelForSpeechSeq2Seq = _merging("AutoModelForSpeechSeq2Seq")
AutoModelForMaskedImageModeling = _merging("AutoModelForMaskedImageModeling")
AutoBackbone = _merging("AutoBackbone")
AutoModelForPreTraining = _merging("AutoModelForPreTraining")
AutoModel = _merging("AutoModel")


def load_trained_classifier(name: str, instead: str = "", **options: Any) -> Any:
    """Load a classifier. Raises NoTrainedHead if the checkpoint lacks its head, which would then be random.

    `instead` is appended to the message: what to do with an encoder without a head.
    """
    with _adapters_named("AutoModelForImageClassification", name):
        config = AutoConfig.from_pretrained(name)
    ending = f"{instead and '; '}{instead}"
    if type(config) not in AutoModelForImageClassification._model_mapping:
        raise NoTrainedHead("model", name, f"an image classifier, and {config.model_type} is none{ending}")
    model, info = AutoModelForImageClassification.from_pretrained(name, output_loading_info=True, **options)
    if info["missing_keys"]:
        lacks = f"a trained classifier, and this one lacks {min(info['missing_keys'])}, which would be random"
        raise NoTrainedHead("model", name, f"{lacks}{ending}")
    return model


def load_whole(auto: Any, name: str, **options: Any) -> Any:
    """Load a model by an Auto class. Raises BadValue if the checkpoint lacks weights, which would be random.

    A pooler like ViT's may be missing, with a warning: many checkpoints lack it, and few readers use it.
    """
    model, info = auto.from_pretrained(name, output_loading_info=True, **options)
    poolers = {key for key in info["missing_keys"] if ".pooler.dense." in f".{key}"}
    if missing := info["missing_keys"] - poolers:
        lacks = f"{len(missing)} weights of {type(model).__name__}, such as {min(missing)}, which would be random"
        raise BadValue("model", name, f"a whole checkpoint, and this one lacks {lacks}")
    if poolers:
        warnings.warn(f"{name} lacks {min(poolers)}: the output of the pooler is random.", stacklevel=2)
    return model


def load_encoder(name: str, features: str, part: str | None = None, **options: Any) -> Any:
    """Load a model whose encoder's features are wanted: `features` is a kind of `recorded_features`.

    `part` chooses one of several encoders. Raises BadValue if the checkpoint lacks weights that the features need, or
    if the encoder does not take single whole images.
    """
    model, info = AutoModel.from_pretrained(name, output_loading_info=True, merge=None, **options)
    place = find_place(model, part)
    encoder = place.encoder
    prefix = next(path for path, module in model.named_modules() if module is encoder)
    missing = [key for key in info["missing_keys"] if key.startswith(prefix and f"{prefix}.")]
    # Features of kind "auto" do not use a pooler like ViT's.
    missing = [key for key in missing if features == "pooled" or ".pooler.dense." not in f".{key}"]
    if missing:
        raise BadValue("model", name, f"a trained encoder, and this one lacks {min(missing)}, which would be random")
    in_rows = "grid_thw" in signature(encoder.forward).parameters
    if in_rows or len(place.family.input_shape(encoder)) != 3 or getattr(encoder.config, "mask_ratio", None):
        takes = f"{type(encoder).__name__} takes clips, sound, rows of patches or a random part of an image"
        raise BadValue("model", name, f"an encoder of whole images, and {takes}")
    return model


@contextmanager
def _adapters_named(auto_name: str, name: Any, revision: str | None = None, **options: Any) -> Iterator[None]:
    """If loading inside the block fails because the name is an adapter's, raise an error that says how to use it."""
    try:
        yield
    except (OSError, ValueError) as error:
        pinned = f"{name}@{revision}" if revision and not os.path.isdir(name) else name
        try:
            adapter = MergeAdapter.from_reference(pinned, **_chosen(options, ADAPTER_ARGUMENTS))
        except (OSError, TypeError, ValueError):  # TypeError: there is no name
            raise error from None
        base_model = adapter.backbone.base_model or "the backbone"
        raise AdapterError(
            f"{name} is a merge adapter for {base_model} ({adapter.backbone.model_type}) and no model; use "
            f"{auto_name}.from_pretrained({base_model!r}, merge={str(pinned)!r})."
        ) from error


def _mapped_classes(auto: Any, config_class: Any) -> tuple[Any, ...]:
    """The model classes that an Auto class has for a config."""
    classes = auto._model_mapping.get(config_class, ())
    return tuple(classes) if isinstance(classes, (list, tuple)) else (classes,)


def auto_class(config: PretrainedConfig) -> Any:
    """The Auto class for the architecture that a config names, or else the preferred one for the config's type.

    Raises UnsupportedModelError if none of the possible models can be merged.
    """
    offered = [
        (auto, cls.__name__)
        for auto in _BY_PREFERENCE
        for cls in _mapped_classes(auto, type(config))
        if issubclass(cls, SUPPORTED) or _holds_encoder(config)
    ]
    if not offered:
        raise unsupported(f"A model of type {config.model_type!r}", config.model_type)
    saved = (auto for auto, name in offered if name in (config.architectures or ()))
    return next(saved, offered[0][0])


def register() -> None:
    """Make transformers' own Auto classes (and so `pipeline(..., model_kwargs={"merge": ...})`) accept `merge=`.

    Calling it again changes nothing; `unregister` undoes it. For a checkpoint that was saved merged, give a folder, a
    Hub id, `config.to_dict()` or None: transformers writes the value into the config, which must be JSON.
    """
    _register(merged_class)


def unregister() -> None:
    """Give transformers' Auto classes their own model classes back."""
    _register(stock_class)


def _register(variant: Callable[[type], type]) -> None:
    """Register variants of the model classes with transformers' Auto classes.

    Of several classes for a config, transformers takes the one that `config.architectures` names, or the first.
    """
    containers = {CONFIG_MAPPING[name] for name in (*CONTAINERS, *OTHERS) if name in CONFIG_MAPPING}
    for auto in _BY_PREFERENCE:
        stock = getattr(transformers, auto.__name__)
        for config_class in {*_CONFIGS, *containers}:
            classes = _mapped_classes(stock, config_class)
            merges = PreTrainedModel if config_class in containers else SUPPORTED
            # `register` of transformers takes only a class that was made for the config.
            own = {cls for cls in classes if issubclass(cls, merges) and cls.config_class is config_class}
            chosen = tuple(variant(cls) if cls in own else cls for cls in classes)
            if chosen != classes:
                stock.register(_key(config_class), chosen[0] if len(chosen) == 1 else chosen, exist_ok=True)


class _OwnKey:
    """Equals a config class of transformers: before 5.19, transformers' `register` ignores its own config classes."""

    def __init__(self, config_class: type) -> None:
        self._config_class = config_class
        self.__name__ = config_class.__name__
        self.__module__ = __name__

    def __hash__(self) -> int:
        return hash(self._config_class)

    def __eq__(self, other: object) -> bool:
        return getattr(other, "_config_class", other) is self._config_class


def _key(config_class: type) -> Any:
    return config_class if Version(transformers.__version__) >= Version("5.19") else _OwnKey(config_class)
