"""One file per family of encoders, with its description in `FAMILY`; a file that is put here is found."""

import sys
from typing import Any

from torch import nn

from ..discovery import import_all
from ..errors import UnsupportedModelError
from .family import Family, check_attention_implementation, input_like


FAMILIES: list[Family] = [module.FAMILY for module in import_all(sys.modules[__name__]) if hasattr(module, "FAMILY")]


_WINDOWS = "its layers attend within windows of a grid, which merged tokens do not form"
# By model type, why no family can be written for a model.
_REASONS = {
    **dict.fromkeys(["sam", "sam_vision_model", "sam_hq", "sam_hq_vision_model", "sam2", "vitdet"], _WINDOWS),
    **dict.fromkeys(["swin", "swinv2", "maskformer-swin", "donut-swin"], _WINDOWS),
    "hiera": "it pools tokens between its layers by their places on a grid",
    "eomt": "its queries join the patches inside the encoder, and it reads a mask off every patch",
    "yolos": "its detection tokens stand behind the patches, among the tokens that merge",
}


def unsupported(name: str, model_type: str = "") -> UnsupportedModelError:
    """The error for a model that belongs to no known family: why, where that is known, and which models do."""
    supported = sorted({cls.__name__ for family in FAMILIES for cls in family.models})
    why = f": {_REASONS[model_type]}" if model_type in _REASONS else ""
    return UnsupportedModelError(f"{name} cannot be merged{why}; supported are {', '.join(supported)}.")


def find_family(model_class: type) -> Family:
    """The family whose models a class belongs to. Raises UnsupportedModelError, listing what is known."""
    for family in FAMILIES:
        if issubclass(model_class, tuple(family.models)):
            return family
    raise unsupported(model_class.__name__, getattr(getattr(model_class, "config_class", None), "model_type", ""))


def find_encoder(model: nn.Module) -> tuple[Family, Any]:
    """The family of a model and the encoder in it that is merged. Raises UnsupportedModelError."""
    family = find_family(type(model))
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, tuple(family.encoders)) and id(module) not in inside:
            found.append(module)
            inside |= {id(child) for child in module.modules()}
    if len(found) != 1:
        raise UnsupportedModelError(f"{type(model).__name__} holds {len(found)} encoders; merging needs exactly one.")
    return family, found[0]


__all__ = [
    "FAMILIES",
    "Family",
    "check_attention_implementation",
    "find_encoder",
    "find_family",
    "input_like",
    "unsupported",
]
