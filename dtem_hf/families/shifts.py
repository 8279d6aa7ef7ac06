"""Learned shifts of a backbone's parameters while it merges: of LayerNorms, and of biases of linear maps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from ..embedding import Shifts
from ..scope import current_state


class Shifted:
    """Mixin for a module of a merged encoder; `merge_name` is the module's name there.

    A pass adds the learned shifts, times the share of tokens merged away, to the parameters `moving`. The stored
    parameters do not change.
    """

    merge_name: str
    moving: ClassVar[tuple[str, ...]]

    def shifted(self: Any, name: str) -> Tensor:
        """A parameter of the module with the shift of the running pass."""
        state, parameter = current_state(), getattr(self, name)
        return parameter if state is None else state.shifted(Shifts.key(self.merge_name, name), parameter)


class ShiftedNorm(Shifted, nn.LayerNorm):
    """A LayerNorm with shifts of weight and bias."""

    moving = ("weight", "bias")

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.shifted("weight"), self.shifted("bias"), self.eps)


class ShiftedLinear(Shifted, nn.Linear):
    """A linear map with a shift of its bias."""

    moving = ("bias",)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.shifted("bias"))


# The name of a module, the module, and the mixin with which its parameters shift: None if they cannot.
Shiftable = tuple[str, Any, type[ShiftedNorm] | type[ShiftedLinear] | None]


def shiftable_modules(encoder: nn.Module, layers: Sequence[nn.Module], in_rows: bool) -> Iterator[Shiftable]:
    """The LayerNorms and biased linear maps in the layers of an encoder, and the LayerNorms behind the layers.

    Behind layers of packed rows (`in_rows`) no module shifts: there, images with different shares of merged tokens lie
    in one sequence. Names are without LoRA's additions. The mixin is None for classes other than torch's own, such as
    quantised ones.
    """
    inside = {id(module) for layer in layers for module in layer.modules()}
    begun = False
    for name, module in encoder.named_modules():
        begun = begun or id(module) in inside
        is_map = isinstance(module, nn.Linear) and id(module) in inside and module.bias is not None
        behind = begun and not in_rows
        is_norm = isinstance(module, nn.LayerNorm) and (id(module) in inside or behind) and module.elementwise_affine
        if (is_map or is_norm) and not name.startswith("merge_embedding."):
            mixin = ShiftedNorm if is_norm else ShiftedLinear
            own = isinstance(module, mixin) or type(module) in (nn.LayerNorm, nn.Linear)
            yield name.replace(".base_layer", ""), module, mixin if own else None


def shiftable_parameters(modules: Sequence[Shiftable]) -> tuple[tuple[str, int], ...]:
    """Names and lengths of all parameters that can be shifted, from declared sizes: weights may be packed."""
    return tuple(
        (f"{name}.{parameter}", module.out_features if isinstance(module, nn.Linear) else module.normalized_shape[0])
        for name, module, mixin in modules
        if mixin is not None
        for parameter in mixin.moving
        if getattr(module, parameter) is not None
    )
