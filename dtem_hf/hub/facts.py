"""The backbone that an adapter was trained for."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from ..errors import MOST_LAYERS, WIDEST, BadValue, check_whole


@dataclass(frozen=True)
class BackboneFacts:
    """Type, depth and width of an adapter's backbone, which a model must share, and its Hub id and commit."""

    model_type: str
    num_layers: int
    hidden_size: int
    base_model: str | None = None
    base_revision: str | None = None

    @classmethod
    def from_dict(cls, values: Any) -> BackboneFacts:
        """Read the `backbone` entry of an adapter's config. Raises ValueError that names the wrong field."""
        names = [f.name for f in fields(cls)]
        if not isinstance(values, dict):
            raise BadValue("backbone", values, f"an object with {', '.join(names)}")
        if not isinstance(values.get("model_type"), str):
            raise BadValue("backbone.model_type", values.get("model_type"), "text")
        check_whole("backbone.num_layers", values.get("num_layers"), 1, MOST_LAYERS)
        check_whole("backbone.hidden_size", values.get("hidden_size"), 1, WIDEST)
        for name in ("base_model", "base_revision"):
            if not isinstance(values.get(name), (str, type(None))):
                raise BadValue(f"backbone.{name}", values[name], "text or null")
        return cls(*[values.get(name) for name in names])  # type: ignore[arg-type]
