"""The README's figures are those of the JSON files it names, and its files are there."""

import json
import re
from pathlib import Path

import pytest

from dtem_hf.report.tables import COLUMNS, as_markdown, cells


ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("source", re.findall(r"<!-- figures of (\S+) -->", README))
def test_table_is_what_the_json_holds(source):
    result = json.loads((ROOT / source).read_text(encoding="utf-8"))
    below = README.split(f"<!-- figures of {source} -->", 1)[1]
    assert as_markdown(COLUMNS, [cells(row) for row in result["rows"]]) in below.split("<!--", 1)[0]


def test_there_are_tables_to_check():
    assert len(re.findall(r"<!-- figures of (\S+) -->", README)) == 2


@pytest.mark.parametrize("path", re.findall(r"\]\(([^)#:]+)\)", README))
def test_linked_files_are_there(path):
    assert (ROOT / path).is_file()
