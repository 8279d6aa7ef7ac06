"""The errors that callers may want to catch, and the check of numbers that raises one of them."""

from __future__ import annotations

from typing import Any


# Bounds of the numbers in configs: above any model's, and far below where a float or a tensor's size overflows.
MOST_LAYERS = 4096
MOST_TOKENS = 1 << 20
WIDEST = 1 << 20


class BadValue(ValueError):
    """A field holds a value that makes no sense: names the field, the value, and what would fit."""

    def __init__(self, field: str, value: Any, expected: str) -> None:
        try:
            shown = repr(value)
        except ValueError:  # Python writes no whole number of more than 4,300 digits
            shown = f"<{type(value).__name__} of too many digits>"
        super().__init__(f"{field}={shown if len(shown) <= 200 else shown[:200] + '…'}: {expected}.")
        self.field, self.value, self.expected = field, value, expected

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.field, self.value, self.expected)


class UnsupportedModelError(ValueError):
    """No family is known for a model, or the way it is set up cannot be merged."""


class AdapterError(ValueError):
    """An adapter cannot be read, or does not fit the backbone it is attached to."""


def check_whole(field: str, value: Any, low: int, high: int) -> None:
    """Raise BadValue unless `value` is an int from `low` to `high`."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise BadValue(field, value, f"a whole number from {low} to {high}")


def check_number(field: str, value: Any, low: float, high: float, *, above: bool = False) -> None:
    """Raise BadValue unless `value` is an int or a float from `low` to `high`; `above`: greater than `low`."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or (above and value == low):
        raise BadValue(field, value, f"a number {f'above {low}, up' if above else f'from {low}'} to {high}")
