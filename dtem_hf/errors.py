"""The errors that callers may want to catch; each says what was given and what would have been right."""

from typing import Any


class BadValue(ValueError):
    """A field holds a value that makes no sense: names the field, the value, and what would fit."""

    def __init__(self, field: str, value: Any, expected: str) -> None:
        shown = repr(value)
        super().__init__(f"{field}={shown if len(shown) <= 200 else shown[:200] + '…'}: {expected}.")
        self.field, self.value, self.expected = field, value, expected

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.field, self.value, self.expected)


class UnsupportedModelError(ValueError):
    """No backbone is known for a model, or the way it is set up cannot be merged."""


class AdapterError(ValueError):
    """An adapter cannot be read, or does not fit the backbone it is attached to."""
