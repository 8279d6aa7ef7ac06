"""The figures in README and docs are those of the JSON files they name, and their files are there."""

import json
import re
from pathlib import Path

import pytest

from dtem_hf.report.tables import as_markdown, table_of


ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "examples" / "README.md",
    ROOT / "recipes" / "paper" / "README.md",
    *sorted(ROOT.glob("docs/*.md")),
]
# A table stands below the name of its JSON, and of its columns if not all of them are shown.
NAMED = re.compile(r"<!-- figures of (\S+?)(?:: (.+?))? -->\n(.*?)\n\n", re.DOTALL)
TABLES = [(page, *table) for page in PAGES for table in NAMED.findall(page.read_text(encoding="utf-8"))]


def written_table(source: Path, columns: str) -> str:
    header, lines = table_of(json.loads(source.read_text("utf-8"))["rows"])
    chosen = columns.split(", ") if columns else header
    rows = [dict(zip(header, line, strict=True)) for line in lines]
    return as_markdown(chosen, [[row[column] for column in chosen] for row in rows])


@pytest.mark.parametrize(("page", "source", "columns", "shown"), TABLES, ids=[f"{t[0].stem}-{t[1]}" for t in TABLES])
def test_table_is_what_the_json_holds(page, source, columns, shown):
    assert shown == written_table(ROOT / source, columns)


def test_there_are_tables_to_check():
    assert {page.name for page, *_ in TABLES} == {"README.md", "quickstart.md", "evaluate.md"}


LINKS = [(page, link) for page in PAGES for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text("utf-8"))]


@pytest.mark.parametrize(("page", "link"), LINKS, ids=[f"{page.stem}-{link}" for page, link in LINKS])
def test_linked_files_are_there(page, link):
    assert (page.parent / link).is_file()


def test_the_readme_begins_with_what_a_user_needs_first():
    """One screen: what it is, a picture, install, three lines that merge, and where to go next."""
    first = (ROOT / "README.md").read_text("utf-8").split("\n## ")[0]
    assert len(first.splitlines()) <= 50
    places = [first.index(each) for each in ("![", "pip install", "from_pretrained(", "<!-- figures of")]
    assert places == sorted(places)
