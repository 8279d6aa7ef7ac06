"""Where the suite begins: what must be set before libraries are imported, and the option `--family`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


# Threads that wait must not keep a core busy, and OpenVINO and NNCF, which start a process for each event that they
# report elsewhere, must not report any.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("CI", "true")
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported, which transformers does

ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--family", help="run what tests this family alone: a file's name in tests/families")


def pytest_configure(config: pytest.Config) -> None:
    """Bring the fixtures, but not where other processes run the tests: their imports take seconds."""
    if config.getoption("dist", "no") == "no":
        config.pluginmanager.import_plugin("tests.support.fixtures")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep one family's tests: those in its own files, and all that have its case, a row or a model as a parameter."""
    family = config.getoption("family")
    if family is None:
        return
    from tests.support.families import CASES

    if family not in CASES:
        raise pytest.UsageError(f"--family {family}: one of {', '.join(CASES)}")
    own = [id(each) for each in (CASES[family], *CASES[family].models)]  # not all parameters can be compared

    def belongs(item: pytest.Item) -> bool:
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        found = any(id(getattr(value, "case", value)) in own for value in values)
        return found or item.path in [
            ROOT / "tests" / "families" / f"{name}.py" for name in (family, f"test_{family}")
        ]

    config.hook.pytest_deselected(items=[item for item in items if not belongs(item)])
    items[:] = filter(belongs, items)
