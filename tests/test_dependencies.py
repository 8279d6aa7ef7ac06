"""What the package imports is declared, and what runs a merged model needs no extra."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import dtem_hf
from dtem_hf.errors import EXTRAS, import_past_scripts, need
from tests.support.hub_client import hub_environment
from tests.support.loopback_hub import LoopbackHub


PACKAGE = Path(dtem_hf.__file__).parent
# Distributions whose module has another name.
DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}
OPTIONAL = sorted({module for modules in EXTRAS.values() for module in modules})
PROGRAM = Path(__file__).parent / "support" / "light_install.py"


@cache
def requirements() -> dict[str, list[Requirement]]:
    """What pyproject.toml declares: "" the base, and all extras by name."""
    project = tomllib.loads(PACKAGE.with_name("pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = {"": project["dependencies"], **project["optional-dependencies"]}
    return {name: [Requirement(each) for each in listed] for name, listed in lists.items()}


def distributions(extra: str) -> set[str]:
    """The names of what an extra brings beyond the base, with that of the extras it names."""
    found: set[str] = set()
    for each in requirements()[extra]:
        found |= set().union(*map(distributions, each.extras)) if each.name == "dtem-hf" else {each.name}
    return found


def imported(tree: ast.AST) -> set[str]:
    """The modules that are imported anywhere in a tree, without those of Python and of the package."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module).split(".")[0])
    return found - set(sys.stdlib_module_names) - {"dtem_hf"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_are_declared(path: Path) -> None:
    named = {DISTRIBUTIONS.get(name, name) for name in imported(ast.parse(path.read_text(encoding="utf-8")))}
    assert named <= distributions("") | distributions("test")


def test_what_huggingface_hub_makes_cards_with_is_declared() -> None:
    """Without it, no adapter can be saved; huggingface_hub imports it when a card is made."""
    assert "jinja2" in distributions("")


@pytest.mark.parametrize("extra", EXTRAS)
def test_the_modules_of_an_extra_are_those_that_it_brings(extra: str) -> None:
    assert {DISTRIBUTIONS.get(module, module) for module in EXTRAS[extra]} == distributions(extra)
    assert not distributions("") & distributions(extra)


def test_a_function_that_imports_an_optional_package_asks_for_it() -> None:
    """Where its own package has not asked already."""
    for path in PACKAGE.rglob("*.py"):
        asks = "need(" in path.with_name("__init__.py").read_text("utf-8")
        for function in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(function, ast.FunctionDef) and imported(function) & set(OPTIONAL) and not asks:
                calls = {getattr(node.func, "id", "") for node in ast.walk(function) if isinstance(node, ast.Call)}
                assert calls & {"need", "known_processes"}, f"{path}: {function.name}"


@pytest.mark.parametrize("extra", EXTRAS)
def test_a_missing_package_is_named_with_the_line_that_installs_it(
    extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, EXTRAS[extra][-1], None)
    with pytest.raises(ImportError) as raised:
        need(extra, "this")
    assert str(raised.value) == f'this needs {EXTRAS[extra][-1]}: pip install "dtem-hf[{extra}]"'
    need(extra, "this", "torch")


@pytest.mark.parametrize("what", ["script", "folder"])
@pytest.mark.parametrize("extra", EXTRAS)
def test_what_has_the_name_of_a_package_is_not_taken_for_it(
    extra: str, what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`recipes/evaluate.py`, whose folder Python puts first in its search path, or a folder of data, `datasets`."""
    for module in EXTRAS[extra]:
        monkeypatch.delitem(sys.modules, module, raising=False)
        if what == "script":
            (tmp_path / f"{module}.py").touch()
        else:
            (tmp_path / module).mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    need(extra, "this")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ImportError, match=f"this needs {', '.join(EXTRAS[extra])}: pip"):
        need(extra, "this")


def test_packages_are_looked_for_and_imported_without_a_change_of_the_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Python's path is one for all threads."""

    class Fixed(list):  # type: ignore[type-arg]
        def __setitem__(self, *_: object) -> None:
            raise AssertionError

    for name in ("xmlrpc", "wsgiref"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError")
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "path", Fixed([str(tmp_path), *sys.path]))
    need("train", "this", "xmlrpc")
    import_past_scripts("wsgiref")
    assert importlib.import_module("wsgiref").__path__
    with pytest.raises(ModuleNotFoundError, match="colorless"):
        import_past_scripts("colorless")


def test_merged_models_run_are_saved_and_published_without_any_extra(
    hub: LoopbackHub, vit_folder: Path, tmp_path: Path
) -> None:
    """In a process without their packages and Pillow. What cannot be imported there says what installs it."""
    environment = hub_environment(hub.endpoint, tmp_path / "home", token="hf_me")
    run = subprocess.run(
        [sys.executable, str(PROGRAM), str(vit_folder), str(tmp_path), *OPTIONAL, "PIL"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    wanted = {
        "dtem_hf.benchmark": "evaluate",
        "dtem_hf.data": "train",
        "dtem_hf.deploy": "onnx",
        "dtem_hf.evaluation": "evaluate",
        "dtem_hf.report": "plots",
        "dtem_hf.training": "train",
        "dtem_hf.advise": "evaluate",
        "dtem_hf.Advice": "evaluate",
        "dtem-hf quickstart": "quickstart",
        "dtem-hf train": "train",
        "dtem-hf evaluate": "evaluate",
        "dtem-hf evaluate-dense": "evaluate",
        "dtem-hf benchmark": "evaluate",
        **{f"dtem-hf {name}": "evaluate" for name in ("compare", "analyze", "calibrate")},
        **{f"dtem-hf evaluate-{name}": "evaluate" for name in ("captions", "segmentation")},
        "dtem-hf report": "plots",
        "dtem-hf advise": "evaluate",
        "dtem-hf export": "onnx",
    }
    lines = {name: re.search(r'pip install "dtem-hf\[(\w+)\]"', text) for name, text in found["refused"].items()}
    assert {name: line and line[1] for name, line in lines.items()} == wanted
    assert found["imported"] == []
    assert set(hub.files("me/light")) >= {"merge_config.json", "merge_adapter.safetensors", "README.md"}
