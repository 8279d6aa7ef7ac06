"""Clips of frames, of which one token is a patch in several frames."""

from __future__ import annotations

from typing import Any

from .family import Family


class VideoFamily(Family):
    """`num_frames` and `tubelet_size` of the config say how long clips and tokens are, in frames."""

    def input_sides(self, config: Any) -> tuple[int, ...]:
        return (config.num_frames, *super().input_sides(config))

    def patch_sides(self, config: Any) -> tuple[int, ...]:
        return (config.tubelet_size, *super().patch_sides(config))
