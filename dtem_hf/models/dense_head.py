"""A user's dense head: a function that makes one map per image from all patches in place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import BadValue
from ..families import find_encoder
from .distances import recorded_features
from .vision import run_on_pixels


@dataclass
class DenseHead:
    """`function` takes patches [B, D, rows, columns] and returns maps [B, H, W] or [B, 1, H, W].

    A module is moved to the patches' device and set to eval mode. `name` is for error messages.
    """

    function: Callable[[Tensor], Any]
    name: str

    def maps_of(self, model: Any, pixel_values: Tensor) -> Tensor:
        """Run a model, and the head on all its final patch tokens: pixels [B, C, height, width] -> [B, H, W]."""
        with recorded_features(model, "grid") as patches:
            run_on_pixels(model, pixel_values)
            return self(model, patches(), pixel_values)

    def __call__(self, model: Any, patches: Tensor, pixel_values: Tensor) -> Tensor:
        """Run the head on final patch tokens [B, N, D] of pixels [B, C, height, width]: maps [B, H, W], float32.

        Raises ValueError if the head returns anything else.
        """
        if isinstance(self.function, nn.Module):
            self.function.to(patches.device).eval()
        family, encoder = find_encoder(model)
        sides = zip(pixel_values.shape[-2:], family.patch_sides(encoder.config)[-2:], strict=True)
        grid = [side // patch for side, patch in sides]
        maps = self.function(patches.unflatten(1, grid).permute(0, 3, 1, 2))  # [B, N, D] -> [B, D, rows, columns]
        shape = list(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
        if isinstance(maps, Tensor) and maps.dim() == 4 and maps.shape[1] == 1:
            maps = maps.squeeze(1)
        if not isinstance(maps, Tensor) or maps.dim() != 3 or len(maps) != len(patches):
            right = f"a function that returns one map per image, [{len(patches)}, H, W], not {shape}"
            raise BadValue("head", self.name, right)
        return maps.float()
