"""Families for video clips: one token is a patch over several frames (a tubelet)."""

from __future__ import annotations

from typing import Any

from .family import Family


class VideoFamily(Family):
    """The config's `num_frames` and `tubelet_size` are the lengths of clips and of tokens, in frames."""

    def input_sides(self, config: Any) -> tuple[int, ...]:
        return (config.num_frames, *super().input_sides(config))

    def patch_sides(self, config: Any) -> tuple[int, ...]:
        return (config.tubelet_size, *super().patch_sides(config))
