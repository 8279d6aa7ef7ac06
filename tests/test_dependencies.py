"""What the package imports is declared: nothing comes along by chance, as a dependency of a dependency."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

import dtem_hf


PACKAGE = Path(dtem_hf.__file__).parent
# Distributions whose module has another name.
DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit_learn", "yaml": "pyyaml"}


def imported(path: Path) -> set[str]:
    """The modules that a file imports, anywhere in it, without those of Python and of the package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module).split(".")[0])
    return found - set(sys.stdlib_module_names) - {"dtem_hf"}


def declared() -> set[str]:
    """The names of all dependencies, of extras too."""
    text = PACKAGE.with_name("pyproject.toml").read_text(encoding="utf-8")
    return {name.lower().replace("-", "_") for name in re.findall(r'"([\w-]+)>=[\d.]+[",;]', text)}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_are_declared(path: Path) -> None:
    assert {DISTRIBUTIONS.get(name, name) for name in imported(path)} <= declared()


def test_what_huggingface_hub_makes_cards_with_is_declared() -> None:
    """Without it, no adapter can be saved; huggingface_hub imports it when a card is made."""
    assert "jinja2" in declared()
