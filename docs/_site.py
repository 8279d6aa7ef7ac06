"""What the site adds to the pages in docs/: pages of files that lie elsewhere, and the help of config fields.

A hook of mkdocs and an extension of griffe in one file; `mkdocs.yml` names it for both.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File


ROOT = Path(__file__).resolve().parents[1]
# Files outside docs/, and the pages that they become. They are written once, for readers of the repository.
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "examples/README.md": "examples.md",
    "recipes/paper/README.md": "paper.md",
    "tests/README.md": "tests.md",
}
_LINK = re.compile(r"\[([^\]]*)\]\(([^):#]+)(#[^)]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that lie outside docs/; below the list of examples, their programs."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        text = _LINK.sub(lambda link, folder=Path(source).parent: _relinked(link, folder), text)
        if page == "examples.md":
            for program in sorted(ROOT.glob("examples/*.py")):
                text += f"\n## {program.name}\n\n```python\n{program.read_text(encoding='utf-8')}```\n"
            text += "".join(map(_notebook, sorted(ROOT.glob("examples/notebooks/*.ipynb"))))
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links of docs/ to files outside it into links to their pages, or into plain text."""
    if page.file.src_uri in PAGES.values():
        return markdown
    return _LINK.sub(lambda link: _relinked(link, Path("docs")) if link[2].startswith("../") else link[0], markdown)


def _notebook(path: Path) -> str:
    """A notebook as a section of a page: its text, with headings two levels lower, and its code."""
    text = f"\n## {path.name}\n"
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        is_text = cell["cell_type"] == "markdown"
        text += f"\n{re.sub('^#', '###', source)}\n" if is_text else f"\n```python\n{source}\n```\n"
    return text


def _relinked(link: re.Match[str], folder: Path) -> str:
    text, target, anchor = link[1], link[2], link[3] or ""
    path = (ROOT / folder / target).resolve().relative_to(ROOT).as_posix()
    if path in PAGES:
        return f"[{text}]({PAGES[path]}{anchor})"
    if path.startswith("docs/"):
        return f"[{text}]({path.removeprefix('docs/')}{anchor})"
    if path.startswith("examples/"):
        return f"[{text}](#{Path(path).name.replace('.', '')})"
    return text


class FieldHelp(griffe.Extension):
    """Shows a config field's help as its docstring, and its default as its value."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        call = ast.parse(str(attr.value), mode="eval").body if attr.value is not None else None
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "_help"):
            return
        text = ast.literal_eval(call.args[0])
        attr.docstring = griffe.Docstring(text[0].upper() + text[1:] + ".", parent=attr)
        defaults = [keyword.value for keyword in call.keywords if keyword.arg == "default"]
        attr.value = ast.unparse(defaults[0]) if defaults else None
