"""Errors name the field and the value, and travel between processes."""

from __future__ import annotations

import pickle

from dtem_hf.errors import BadValue


def test_bad_value_names_field_value_and_what_fits() -> None:
    error = BadValue("r", -1, "0 or more")
    assert str(error) == "r=-1: 0 or more."
    assert isinstance(error, ValueError)


def test_a_huge_value_does_not_flood_the_message() -> None:
    assert len(str(BadValue("r", list(range(10**5)), "one per layer"))) < 300


def test_bad_value_can_be_pickled() -> None:
    """As a data loader's worker does with what it raises."""
    error = pickle.loads(pickle.dumps(BadValue("r", [1, 2], "one per layer")))
    assert (error.field, error.value, error.expected) == ("r", [1, 2], "one per layer")
    assert str(error) == "r=[1, 2]: one per layer."
