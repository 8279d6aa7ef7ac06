"""ViViT: ViT's layers on clips; CLS, then the tubelets."""

from __future__ import annotations

from typing import Any

from transformers.models.vivit.modeling_vivit import VivitForVideoClassification, VivitModel

from .video import VideoFamily
from .vit import VIT_LAYER


class VivitFamily(VideoFamily):
    """The config's `tubelet_size` holds frames, height and width."""

    def patch_sides(self, config: Any) -> tuple[int, ...]:
        return tuple(config.tubelet_size)


FAMILY = VivitFamily(
    encoders={VivitModel: "layers"},
    anatomy=VIT_LAYER,
    models={VivitModel: "tokens", VivitForVideoClassification: "tokens"},
)
