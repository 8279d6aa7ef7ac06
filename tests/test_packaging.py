"""The package as it is installed: light to import, whole, and of one version."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import dtem_hf


@pytest.mark.parametrize("module", ["dtem_hf", "dtem_hf.cli", "dtem_hf.configuration"])
def test_import_is_light(module):
    code = f"import sys, {module}; print([name for name in ('torch', 'transformers') if name in sys.modules])"

    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("name", dtem_hf.__all__)
def test_public_name_resolves(name):
    assert getattr(dtem_hf, name).__module__.startswith("dtem_hf.")


def test_every_lazy_name_is_public():
    assert dtem_hf.__all__ == sorted(dtem_hf._HOME_OF)
    assert set(dtem_hf.__all__) <= set(dir(dtem_hf))


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = dtem_hf.Nothing


def test_version_is_that_of_the_distribution():
    try:
        distribution = importlib.metadata.distribution("dtem-hf")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("dtem-hf is not installed")

    assert distribution.version == dtem_hf.__version__
    assert distribution.metadata["License-Expression"] == "Apache-2.0"


def test_data_files_lie_in_the_package():
    package = Path(dtem_hf.__file__).parent

    assert (package / "py.typed").is_file()
    assert (package / "hub" / "card_template.md").is_file()
