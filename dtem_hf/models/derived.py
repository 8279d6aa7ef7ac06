"""Classes of merged modules: subclasses of transformers' classes with mixins in front, under the same names.

transformers finds recorded outputs, device maps and checkpoints by a class's name; `isinstance` still holds.
"""

from __future__ import annotations

from functools import cache
from types import MethodType
from typing import Any, ClassVar

from torch import nn


class DerivedMixin:
    """Base of the mixins of derived classes; a module of a derived class is pickled by its base and mixins."""

    derived_from: ClassVar[tuple[type, ...]]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        reduced: Any = super().__reduce_ex__(max(2, protocol))
        return _new_derived, self.derived_from, *reduced[2:]


@cache
def derived_class(base: type, *mixins: type) -> type:
    """`base` with mixins in front, under the name of `base`."""
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (*mixins, base), {**names, "derived_from": (base, *mixins)})


def _new_derived(base: type, *mixins: type) -> Any:
    cls: Any = derived_class(base, *mixins)
    return cls.__new__(cls)


def derive_class(module: nn.Module, *mixins: type) -> None:
    """Put mixins in front of a module's class; it keeps its name."""
    base: type = type(module)
    change_class(module, derived_class(base, *mixins))


def stock_class(cls: type) -> type:
    """The class that a derived class was made from; any other class is returned unchanged.

    Classes that other libraries put on top of a derived class, as FSDP2 and torch's parametrizations do, stay on top.
    """
    if not issubclass(cls, DerivedMixin):
        return cls
    if "derived_from" in vars(cls):
        return cls.derived_from[0]
    derived = next(base for base in cls.__mro__ if "derived_from" in vars(base))
    # The mixins wrap `forward` in every class that is derived from them: leave that wrapper out.
    content = {name: value for name, value in vars(cls).items() if name not in vars(derived)}
    return type(cls.__name__, tuple(map(stock_class, cls.__bases__)), {**content, "__module__": cls.__module__})


def restore_class(module: nn.Module) -> None:
    """Give a module of a derived class its original class back; other modules do not change."""
    if isinstance(module, DerivedMixin):
        change_class(module, stock_class(type(module)))


def change_class(module: Any, new: type) -> None:
    """Change the class of a module, and with it its forward pass."""
    module.__class__ = new
    if "_old_forward" in vars(module):  # accelerate's hooks store the forward pass that they wrap
        module._old_forward = MethodType(new.forward, module)  # type: ignore[attr-defined]
