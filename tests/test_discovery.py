"""A new file in a package is all that a new backbone or method needs."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from dtem_hf.discovery import import_all


def test_every_module_of_a_package_is_imported_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "family_of_tests"
    (package / "below").mkdir(parents=True)
    (package / "__init__.py").write_text("found = []\n")
    for name in ("zeta", "alpha"):
        (package / f"{name}.py").write_text(f"from . import found\nfound.append({name!r})\n")
    (package / "below" / "__init__.py").write_text("from .. import found\nfound.append('below')\n")
    (package / "notes.txt").write_text("no module")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("family_of_tests")
    try:
        import_all(module)
        assert module.found == ["alpha", "below", "zeta"]
    finally:
        for name in [name for name in sys.modules if name.startswith("family_of_tests")]:
            del sys.modules[name]
