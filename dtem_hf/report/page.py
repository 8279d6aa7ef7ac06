"""One page with the tables, plots and pictures of runs: an HTML file that needs no other file and runs no script.

python recipes/report.py --folders runs/compare runs/analysis --output runs/report.html
"""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from ..errors import BadValue
from ..files import read_json, write_text
from ..programs.arguments import option, parse_arguments
from .tables import TextTable, table_of


# The files to read, in the order of the page.
KNOWN_RECORDS = (
    *("comparison.json", "evaluation.json", "dense.json", "benchmark.json", "correlation.json", "captions.json"),
    "segmentation.json",
)
_LARGEST_RECORD = 1 << 24
_PICTURES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #222; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-top: 1px solid #ddd; padding-top: 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #e5e5e5; text-align: right; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 2px solid #999; }
.facts td { text-align: left; } img { max-width: 100%; height: auto; } figure { margin: 1rem 0; }
figcaption, .facts { color: #555; font-size: .9em; } code { background: #f4f4f4; overflow-wrap: anywhere; }
"""


@dataclass(kw_only=True)
class ReportArguments:
    """Put the records and pictures of several folders on one page."""

    folders: list[str] = option("folders of runs, in the order of the page")
    output: str = option("the HTML file", default="runs/report.html")
    title: str = option("title of the page", default="Token merging: results")

    def __post_init__(self) -> None:
        if not self.output.lower().endswith((".html", ".htm")):
            raise BadValue("output", self.output, "a name that ends in .html")


@dataclass
class Section:
    """A part of the page: facts by name, tables, and pictures by caption."""

    title: str
    facts: dict[str, str] = field(default_factory=dict)
    tables: list[TextTable] = field(default_factory=list)
    pictures: dict[str, Path] = field(default_factory=dict)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and write the page."""
    arguments = parse_arguments(ReportArguments, argv, __doc__ or "")
    write_report(arguments.output, arguments.title, [read_section(folder) for folder in arguments.folders])
    print(f"written: {arguments.output}")


def write_report(path: str | os.PathLike[str], title: str, sections: Sequence[Section]) -> None:
    """Write a page atomically. All text is escaped, and the pictures are embedded in the file.

    Raises ValueError if there is no section, or if a picture has a format that browsers do not show.
    """
    if not sections:
        raise BadValue("sections", 0, "at least one")
    body = "\n".join(_section_html(section) for section in sections)
    write_text(
        path,
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width">\n<title>{escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n",
    )


def read_section(folder: str | os.PathLike[str]) -> Section:
    """Read a folder's records with known names and all its pictures. Raises FileNotFoundError if it has none."""
    folder = Path(folder)
    section = Section(folder.name)
    for name in KNOWN_RECORDS:
        if (folder / name).is_file():
            record = read_json(folder / name, _LARGEST_RECORD)
            if not isinstance(record, dict):
                raise BadValue(name, type(record).__name__, "a JSON object")
            for fact, value in _facts(record).items():
                if section.facts.setdefault(fact, value) != value:
                    section.facts[f"{fact} ({Path(name).stem})"] = value
            section.tables.append(table_of(record["rows"]))
    for path in sorted(folder.glob("*")):
        if path.suffix.lower() in _PICTURES:
            section.pictures[path.stem.replace("_", " ")] = path
    if not section.tables and not section.pictures:
        raise FileNotFoundError(f"{folder} has no picture and none of {', '.join(KNOWN_RECORDS)}")
    return section


def _facts(record: dict[str, Any]) -> dict[str, str]:
    """The conditions in a record."""
    data, model = record.get("data") or {}, record.get("model") or {}
    facts = {
        "model": model.get("name") if isinstance(model, dict) else model,
        "data": f"{data['num_images']:,} images of {data['name']}" if {"num_images", "name"} <= set(data) else None,
        "hardware": record.get("hardware"),
        "versions": ", ".join(f"{name} {version}" for name, version in (record.get("versions") or {}).items()),
        "command": record.get("command"),
    }
    return {name: str(value) for name, value in facts.items() if value}


def _section_html(section: Section) -> str:
    parts = [f"<h2>{escape(section.title)}</h2>"]
    if section.facts:
        facts = "".join(
            f"<tr><td>{escape(k)}</td><td><code>{escape(v)}</code></td></tr>" for k, v in section.facts.items()
        )
        parts.append(f'<table class="facts"><tbody>{facts}</tbody></table>')
    for columns, lines in section.tables:
        head = "".join(f"<th>{escape(name)}</th>" for name in columns)
        rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>\n" for line in lines)
        parts.append(f"<table><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table>")
    for caption, path in section.pictures.items():
        kind = _PICTURES.get(path.suffix.lower())
        if kind is None:
            raise BadValue("picture", path.name, f"one that ends in {', '.join(_PICTURES)}")
        data = base64.b64encode(path.read_bytes()).decode("ascii")
        text = escape(caption)
        parts.append(
            f'<figure><img src="data:{kind};base64,{data}" alt="{text}"><figcaption>{text}</figcaption></figure>'
        )
    return "\n".join(parts)
