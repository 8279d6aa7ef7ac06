"""A new file in a package is all that a new backbone or method needs."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from dtem_hf.discovery import import_all
from tests.support.children import run_python
from tests.support.families import CASES


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


def test_the_tests_of_one_family_are_found(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Its own, and its rows of the files for all families; see `make test-family`."""
    command = ["-m", "pytest", "-p", "no:xdist", "tests/families", "--collect-only", "--family", "git"]
    done = run_python(command, cwd=Path(__file__).resolve().parents[1])
    found = [line for line in done.stdout.splitlines() if "::" in line]
    assert {line.partition("::")[0].rpartition("/")[2] for line in found} >= {
        "git.py",
        *(f"test_{name}.py" for name in ("declarations", "ecosystem", "promises", "slow_reference", "unmerging")),
    }
    assert not [line for line in found if "beit" in line.lower() or "clip" in line.lower()]
    monkeypatch.setattr(request.config.option, "family", "gut")
    with pytest.raises(pytest.UsageError, match=f"--family gut: one of {', '.join(CASES)}"):
        request.config.hook.pytest_collection_modifyitems(session=request.session, config=request.config, items=[])
