"""All families that `tests/families` declares."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from tests.support.family_case import FamilyCase, Row


def _find() -> dict[str, FamilyCase]:
    folder = Path(__file__).resolve().parents[1] / "families"
    names = sorted(path.stem for path in folder.glob("[a-z]*.py") if not path.stem.startswith("test_"))
    cases = {name: import_module(f"tests.families.{name}").CASE for name in names}
    for name, case in cases.items():
        assert case.family == name, f"tests/families/{name}.py: CASE is of the family {case.family!r}"
    return cases


CASES: dict[str, FamilyCase] = _find()
ROWS: list[Row] = [row for case in CASES.values() for row in case.rows]


def row_of(name: str) -> Row:
    """A row by its name: the family, and behind a hyphen its variant."""
    return next(row for row in ROWS if str(row) == name)
