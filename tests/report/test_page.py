"""The page of a run: whole in one file, and nothing in it that a record could smuggle in."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from dtem_hf import BadValue
from dtem_hf.report.page import KNOWN_RECORDS, Section, main, read_section, write_report


EVIL = '<script>alert("x")</script>&"\''
EVALUATION = {
    "command": f"recipes/evaluate.py --data {EVIL}",
    "model": {"name": EVIL},
    "data": {"name": "folder", "num_images": 1000},
    "hardware": "a CPU",
    "versions": {"torch": "2.13"},
    "rows": [
        {"method": "none", "r": None, "top1": 78.5, "top5": 93.0, "agreement": 100.0, "kl": 0.0}
        | {"multiply_adds": 1_250_000_000, "ratio": 1.0, "images_per_second": 50.0, "speedup": 1.0}
    ],
}


class Reader(HTMLParser):
    """Tags, their attributes and the text of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "run <1>"
    folder.mkdir()
    (folder / "evaluation.json").write_text(json.dumps(EVALUATION))
    (folder / "correlation.json").write_text(
        json.dumps({"rows": [{"blocks": "1–4", "after": 0.12345}, {"blocks": EVIL}]})
    )
    Image.new("RGB", (3, 2), (255, 0, 0)).save(folder / "merged_tokens.png")
    (folder / "notes.txt").write_text("not for the page")
    return folder


def test_page_holds_tables_and_pictures_of_a_folder(folder, tmp_path, capsys):
    main(["--folders", str(folder), "--output", str(tmp_path / "page.html"), "--title", EVIL])
    page = (tmp_path / "page.html").read_text()
    read = Reader(page)
    text = " ".join(read.texts)
    assert "78.5" in text and "1250.0" in text and "0.1235" in text and "1,000 images of folder" in text
    assert "run <1>" in text and "merged tokens" in text and "not for the page" not in text
    [picture] = [attributes for tag, attributes in read.tags if tag == "img"]
    kind, data = picture["src"].split(",", 1)
    assert kind == "data:image/png;base64"
    assert base64.b64decode(data) == (folder / "merged_tokens.png").read_bytes()
    assert "page.html" in capsys.readouterr().out


def test_every_record_keeps_its_own_command(folder):
    record = {**EVALUATION, "command": "recipes/other.py"}
    (folder / "comparison.json").write_text(json.dumps(record))
    facts = read_section(folder).facts
    assert facts["command"] == "recipes/other.py" and facts["command (evaluation)"] == EVALUATION["command"]
    assert facts["hardware"] == "a CPU" and "hardware (evaluation)" not in facts


def test_everything_is_escaped_and_nothing_is_fetched(folder, tmp_path):
    section = Section(EVIL, {EVIL: EVIL}, [([EVIL], [[EVIL]])], {EVIL: folder / "merged_tokens.png"})
    write_report(tmp_path / "page.html", EVIL, [read_section(folder), section])
    page = (tmp_path / "page.html").read_text()
    read = Reader(page)
    assert {tag for tag, _ in read.tags}.isdisjoint({"script", "link", "iframe", "object"})
    assert "<script" not in page
    assert sum(EVIL in text for text in read.texts) >= 8
    for _, attributes in read.tags:
        assert not any(name.startswith("on") for name in attributes)
        for value in (attributes.get("src"), attributes.get("href")):
            assert value is None or value.startswith("data:image/")
    assert not re.search(r"(https?:)?//", page)


def test_a_folder_without_results_and_a_page_without_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no picture and none of comparison\.json"):
        read_section(tmp_path)
    with pytest.raises(BadValue, match="at least one"):
        write_report(tmp_path / "page.html", "t", [])
    with pytest.raises(BadValue, match=r"output='page\.pdf'"):
        main(["--folders", "x", "--output", "page.pdf"])
    (tmp_path / "evaluation.json").write_text("[]")
    with pytest.raises(BadValue, match="a JSON object"):
        read_section(tmp_path)
    assert not (tmp_path / "page.html").exists()


ROOT = Path(__file__).resolve().parents[2]
RECORDED = sorted({path.parent for top in ("docs", "model_cards") for path in (ROOT / top).rglob("*.json")})


@pytest.mark.parametrize("folder", RECORDED, ids=lambda path: str(path.relative_to(ROOT)))
def test_records_of_the_repository_become_tables(folder):
    """Those that have a known name: every row is one row of the page, under all columns."""
    known = [name for name in KNOWN_RECORDS if (folder / name).is_file()]
    if known:
        section = read_section(folder)
        counted = [len(json.loads((folder / name).read_text())["rows"]) for name in known]
        assert [len(lines) for _, lines in section.tables] == counted
        assert all(len(line) == len(columns) for columns, lines in section.tables for line in lines)
