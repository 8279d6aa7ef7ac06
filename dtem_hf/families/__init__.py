"""One file per family of encoders, with its description in `FAMILY`; a file that is put here is found."""

import sys
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..discovery import import_all
from ..errors import BadValue, UnsupportedModelError
from .family import Family, check_attention_implementation, input_like


FAMILIES: list[Family] = [module.FAMILY for module in import_all(sys.modules[__name__]) if hasattr(module, "FAMILY")]
SUPPORTED = tuple(cls for family in FAMILIES for cls in family.models)


def unsupported(name: str) -> UnsupportedModelError:
    """The error for a model that belongs to no known family; it lists those that do."""
    supported = sorted({cls.__name__ for family in FAMILIES for cls in family.models})
    return UnsupportedModelError(f"{name} cannot be merged; supported are {', '.join(supported)}.")


def find_family(model_class: type) -> Family:
    """The family whose models a class belongs to. Raises UnsupportedModelError, listing what is known."""
    for family in FAMILIES:
        if issubclass(model_class, tuple(family.models)):
            return family
    raise unsupported(model_class.__name__)


@dataclass(frozen=True)
class Place:
    """Where a model merges: `holder` is a model of the family, the whole one or, in a container, a part of it.

    `part` is the holder's dotted name, "" for the whole model.
    """

    family: Family
    holder: Any
    encoder: Any
    part: str


def find_place(model: nn.Module, part: str | None = None) -> Place:
    """Find the encoder that is merged. A container's `part` is chosen by its dotted name, or the end of it.

    Without `part`, of several parts the one that merges already is meant. Raises UnsupportedModelError where no part
    can be merged, and ValueError where several can or none has that name.
    """
    if isinstance(model, SUPPORTED) and part is None:
        return _place(model, "")
    parts = {name: module for name, module in model.named_modules() if isinstance(module, SUPPORTED)}
    outermost = {
        name: module for name, module in parts.items() if not any(name.startswith(f"{outer}.") for outer in parts)
    }
    listed = ", ".join(f"{name!r} ({type(module).__name__})" for name, module in outermost.items())
    if part is not None:
        chosen = [name for name in outermost if f".{name}".endswith(f".{part}")]
        if len(chosen) != 1:
            raise BadValue("part", part, f"one of the parts of {type(model).__name__} that can be merged: {listed}")
        return _place(outermost[chosen[0]], chosen[0])
    if not outermost:
        raise unsupported(type(model).__name__)
    places = [_place(module, name) for name, module in outermost.items()]
    merged = [place for place in places if "merging" in vars(place.encoder)]
    if len(places) > 1 and len(merged) != 1:
        raise BadValue("part", part, f"a part of {type(model).__name__}: it holds {listed}")
    return merged[0] if merged else places[0]


def _place(holder: nn.Module, part: str) -> Place:
    family = find_family(type(holder))
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in holder.modules():
        if isinstance(module, tuple(family.encoders)) and id(module) not in inside:
            found.append(module)
            inside |= {id(child) for child in module.modules()}
    if len(found) != 1:
        raise UnsupportedModelError(f"{type(holder).__name__} holds {len(found)} encoders; merging needs exactly one.")
    return Place(family, holder, found[0], part)


def find_encoder(model: nn.Module) -> tuple[Family, Any]:
    """The family of a model, or of its part that is merged, and the encoder. Raises as `find_place`."""
    place = find_place(model)
    return place.family, place.encoder


__all__ = [
    "FAMILIES",
    "SUPPORTED",
    "Family",
    "Place",
    "check_attention_implementation",
    "find_encoder",
    "find_family",
    "find_place",
    "input_like",
    "unsupported",
]
