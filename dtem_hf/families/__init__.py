"""One file per family of encoders; a file that is put here is found."""

import sys
from typing import Any

from torch import nn

from ..discovery import import_all
from ..errors import UnsupportedModelError
from .base import Backbone, LayerMerging, check_attention_implementation


import_all(sys.modules[__name__])


def families() -> list[Backbone]:
    """All families that are known."""
    return [family() for family in _subclasses(Backbone) if hasattr(family, "encoder_class")]


def _subclasses(cls: Any) -> list[Any]:
    return [each for child in cls.__subclasses__() for each in (child, *_subclasses(child))]


def unsupported(name: str) -> UnsupportedModelError:
    """The error for a model that no family knows; it lists those that are known."""
    supported = sorted({cls.__name__ for family in families() for cls in family.all_models()})
    return UnsupportedModelError(f"{name} cannot be merged; supported are {', '.join(supported)}.")


def find_family(model_class: type) -> Backbone:
    """The family whose models a class belongs to. Raises UnsupportedModelError, listing what is known."""
    for family in families():
        if issubclass(model_class, family.all_models()):
            return family
    raise unsupported(model_class.__name__)


def find_backbone(model: nn.Module) -> tuple[Backbone, Any]:
    """The family of a model and the encoder in it that is merged. Raises UnsupportedModelError."""
    family = find_family(type(model))
    encoders = [module for module in model.modules() if isinstance(module, family.encoder_class)]
    if len(encoders) != 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} holds {len(encoders)} encoders; merging needs exactly one."
        )
    return family, encoders[0]


__all__ = [
    "Backbone",
    "LayerMerging",
    "check_attention_implementation",
    "families",
    "find_backbone",
    "find_family",
    "unsupported",
]
