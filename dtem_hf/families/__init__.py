"""Families of encoders, one per file, described by `FAMILY`. New files in this folder are imported automatically."""

import sys
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..discovery import import_all
from ..errors import BadValue, UnsupportedModelError
from .family import Family


FAMILIES: list[Family] = [module.FAMILY for module in import_all(sys.modules[__name__]) if hasattr(module, "FAMILY")]
SUPPORTED = tuple(cls for family in FAMILIES for cls in family.models)


_WINDOWS = "its layers attend within windows of a grid, which merged tokens do not form"
# By model type: why the package cannot support a model.
_REASONS = {
    **dict.fromkeys(["sam", "sam_vision_model", "sam_hq", "sam_hq_vision_model", "sam2", "vitdet"], _WINDOWS),
    **dict.fromkeys(["swin", "swinv2", "maskformer-swin", "donut-swin"], _WINDOWS),
    **dict.fromkeys(["qwen2_5_vl", "qwen2_5_vl_vision"], _WINDOWS),
    "hiera": "it pools tokens between its layers by their places on a grid",
    "eomt": "its queries join the patches inside the encoder, and it needs a mask for every patch",
    "yolos": "its detection tokens stand behind the patches, among the tokens that merge",
}


def unsupported(name: str, model_type: str = "") -> UnsupportedModelError:
    """The error for a model of no known family. It says why, and where supported models are listed."""
    why = _REASONS.get(model_type, "it holds no encoder that dtem_hf knows")
    return UnsupportedModelError(
        f"{name} cannot be merged: {why}. Supported are vision transformers of {len(FAMILIES)} families, such as ViT, "
        "DeiT, DINOv2, CLIP and SigLIP, and models around them; docs/ecosystem.md lists all."
    )


def find_family(model_class: type) -> Family:
    """The family of a model class. Raises UnsupportedModelError."""
    for base in model_class.__mro__:  # the nearest base first: some models are subclasses of another family's
        for family in FAMILIES:
            if base in family.models:
                return family
    raise unsupported(model_class.__name__, getattr(getattr(model_class, "config_class", None), "model_type", ""))


@dataclass(frozen=True)
class Place:
    """Where a model merges: in `encoder`, inside `holder`, which is a model of the family.

    `holder` is the whole model, or a part of a container. `part` is its dotted name, "" for the whole model.
    """

    family: Family
    holder: Any
    encoder: Any
    part: str


def find_place(model: nn.Module, part: str | None = None) -> Place:
    """Find the encoder to merge, or the encoder that is merged. `part` is a container part's dotted name, or its end.

    In a model without its head, a part may have the name that it has in the whole model. Without `part`, it is the
    only part that can be merged, or of several parts the one that is merged already. Raises UnsupportedModelError if
    no part can be merged, and ValueError if the choice is not clear or no part has the name.
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
    """The outermost encoders in a model that are of its family; it may also hold encoders of other families."""
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
    """The family and the encoder of `find_place`; raises what it raises."""
    place = find_place(model)
    return place.family, place.encoder
