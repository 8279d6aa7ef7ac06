"""One file per family of encoders, with its description in `FAMILY`; a file that is put here is found."""

import sys
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..discovery import import_all
from ..errors import BadValue, UnsupportedModelError
from .family import Family, input_like
from .unmasked_attention import serve_attention


FAMILIES: list[Family] = [module.FAMILY for module in import_all(sys.modules[__name__]) if hasattr(module, "FAMILY")]
SUPPORTED = tuple(cls for family in FAMILIES for cls in family.models)


_WINDOWS = "its layers attend within windows of a grid, which merged tokens do not form"
# By model type, why no family can be written for a model.
_REASONS = {
    **dict.fromkeys(["sam", "sam_vision_model", "sam_hq", "sam_hq_vision_model", "sam2", "vitdet"], _WINDOWS),
    **dict.fromkeys(["swin", "swinv2", "maskformer-swin", "donut-swin"], _WINDOWS),
    **dict.fromkeys(["qwen2_5_vl", "qwen2_5_vl_vision"], _WINDOWS),
    "hiera": "it pools tokens between its layers by their places on a grid",
    "eomt": "its queries join the patches inside the encoder, and it reads a mask off every patch",
    "yolos": "its detection tokens stand behind the patches, among the tokens that merge",
}


def unsupported(name: str, model_type: str = "") -> UnsupportedModelError:
    """The error for a model that belongs to no known family: why, and where those that can be merged are listed."""
    why = _REASONS.get(model_type, "none of the encoders that dtem_hf knows is in it")
    return UnsupportedModelError(
        f"{name} cannot be merged: {why}. Supported are vision transformers of {len(FAMILIES)} families, such as ViT, "
        "DeiT, DINOv2, CLIP and SigLIP, and models around them; docs/ecosystem.md lists all."
    )


def find_family(model_class: type) -> Family:
    """The family whose models a class belongs to. Raises UnsupportedModelError."""
    for base in model_class.__mro__:  # the nearest: a family's models may be subclasses of another's
        for family in FAMILIES:
            if base in family.models:
                return family
    raise unsupported(model_class.__name__, getattr(getattr(model_class, "config_class", None), "model_type", ""))


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

    In a model without its head, it may have the name that it has in the whole one. Without `part`, of several parts
    the one that merges already is meant. Raises UnsupportedModelError where no part can be merged, and ValueError
    where several can or none has that name.
    """
    if isinstance(model, SUPPORTED) and part is None and _encoders(model):
        return _place(model, "")
    parts = {name: module for name, module in model.named_modules() if name and isinstance(module, SUPPORTED)}
    outermost = {
        name: module for name, module in parts.items() if not any(name.startswith(f"{outer}.") for outer in parts)
    }
    listed = ", ".join(f"{name!r} ({type(module).__name__})" for name, module in outermost.items())
    if not outermost and not isinstance(model, SUPPORTED):
        raise unsupported(type(model).__name__, getattr(getattr(model, "config", None), "model_type", ""))
    if part is not None:
        headless = part.removeprefix(f"{getattr(model, 'base_model_prefix', '')}.")
        for ending in (part, headless):
            chosen = [name for name in outermost if f".{name}".endswith(f".{ending}")]
            if chosen:
                break
        if len(chosen) != 1:
            among = f"one of the parts of {type(model).__name__} that can be merged: {listed}"
            whole = f"None, as {type(model).__name__} is merged as a whole"
            raise BadValue("part", part, among if outermost else whole)
        return _place(outermost[chosen[0]], chosen[0])
    if not outermost:
        return _place(model, "")  # which says what is missing
    places = [_place(module, name) for name, module in outermost.items()]
    merged = [place for place in places if "merging" in vars(place.encoder)]
    if len(places) > 1 and len(merged) != 1:
        raise BadValue("part", part, f"a part of {type(model).__name__}: it holds {listed}")
    return merged[0] if merged else places[0]


def _encoders(holder: nn.Module) -> list[nn.Module]:
    """The outermost encoders of a model's own family in it: a model may also be built around one of another family."""
    family = find_family(type(holder))
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in holder.modules():
        if isinstance(module, tuple(family.encoders)) and id(module) not in inside:
            found.append(module)
            inside |= {id(child) for child in module.modules()}
    return found


def _place(holder: nn.Module, part: str) -> Place:
    family, found = find_family(type(holder)), _encoders(holder)
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
    "find_encoder",
    "find_family",
    "find_place",
    "input_like",
    "serve_attention",
    "unsupported",
]
