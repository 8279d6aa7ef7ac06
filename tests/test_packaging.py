"""The package as it is installed: light to import, whole, and of one version."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import dtem_hf


@pytest.mark.parametrize("module", ["dtem_hf", "dtem_hf.cli", "dtem_hf.configuration"])
def test_import_is_light(module):
    code = f"import sys, {module}; print([name for name in ('torch', 'transformers') if name in sys.modules])"

    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("name", dtem_hf.__all__)
def test_public_name_resolves(name):
    assert getattr(dtem_hf, name).__module__.startswith("dtem_hf.")


def test_type_checkers_see_every_public_name():
    """In a stub, `X as X` makes a name public."""
    stub = ast.parse(Path(dtem_hf.__file__).with_suffix(".pyi").read_text("utf-8"))
    names = [name for line in stub.body if isinstance(line, ast.ImportFrom) for name in line.names]
    assert all(name.asname == name.name for name in names)
    assert {name.name for name in names} == set(dtem_hf.__all__) <= set(dir(dtem_hf))


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
    assert (package / "__init__.pyi").is_file()
    assert (package / "hub" / "card_template.md").is_file()


ROOT = Path(__file__).resolve().parents[1]
FORMS = sorted(ROOT.glob(".github/ISSUE_TEMPLATE/[bm]*.yml"))


def test_the_gate_runs_on_every_python_that_the_package_names():
    gate = yaml.safe_load((ROOT / ".github/workflows/gate.yml").read_text("utf-8"))
    classifiers = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text("utf-8"))
    assert gate["jobs"]["test"]["strategy"]["matrix"]["python"] == classifiers
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    steps = [step.get("run", "") for job in gate["jobs"].values() for step in job["steps"]]
    assert {step.split()[1] for step in steps if step.startswith("make ")} <= set(targets)
    local = re.findall(r"^step make (\S+)$", (ROOT / ".ci/run").read_text("utf-8"), re.MULTILINE)
    assert all(any(step.startswith(f"make {target} ") for step in steps) for target in local)


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms_have_what_github_asks_for(path):
    form = yaml.safe_load(path.read_text("utf-8"))
    assert form["name"] and form["description"]
    ids = [field["id"] for field in form["body"]]
    assert len(ids) == len(set(ids)) and all(field["attributes"]["label"] for field in form["body"])


def test_the_citation_names_the_project_and_its_licence():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert (citation["title"], citation["license"]) == ("dtem-hf", "Apache-2.0")
    assert citation["authors"] == [{"name": "The dtem-hf contributors"}]
    identifiers = [
        each["value"].removeprefix("arXiv:") for paper in citation["references"] for each in paper["identifiers"]
    ]
    assert all(f"arXiv {identifier}" in (ROOT / "README.md").read_text("utf-8") for identifier in identifiers)
