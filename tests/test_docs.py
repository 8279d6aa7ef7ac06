"""The tables in docs are what their JSON holds, by the code that wrote them."""

import json
from pathlib import Path

import pytest

from dtem_hf import MergeConfig
from dtem_hf.benchmark import tables as benchmark_tables
from dtem_hf.evaluation.comparison import csv_table, markdown


DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.mark.parametrize("path", sorted(DOCS.rglob("comparison.json")), ids=lambda path: path.parent.name)
def test_comparison_is_what_the_json_holds(path):
    result = json.loads(path.read_text(encoding="utf-8"))
    assert path.with_suffix(".md").read_text(encoding="utf-8") == markdown(result)
    assert path.with_suffix(".csv").read_text(encoding="utf-8") == csv_table(result["rows"])
    for row in result["rows"][1:]:
        assert row["ratio"] <= row["r"]["flops"] or row["method"] == "soft"
    assert (path.parent / "pareto.png").is_file()


def test_there_is_a_comparison_to_check():
    assert list(DOCS.rglob("comparison.json"))


@pytest.mark.parametrize("path", sorted(DOCS.glob("performance/*/benchmark.json")), ids=lambda path: path.parent.name)
def test_benchmark_is_what_the_json_holds(path):
    result = json.loads(path.read_text(encoding="utf-8"))
    assert path.with_suffix(".md").read_text(encoding="utf-8") == benchmark_tables.markdown(result)
    assert (path.parent / "speedup.png").is_file()
    assert f"(performance/{path.parent.name}/benchmark.md)" in (DOCS / "performance.md").read_text(encoding="utf-8")


def test_the_page_on_methods_shows_what_the_comparison_found():
    page = (DOCS / "methods.md").read_text(encoding="utf-8")
    rows = json.loads((DOCS / "deit-tiny/methods/comparison.json").read_text(encoding="utf-8"))["rows"]
    shown = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| −")]
    for cost, *figures in shown:
        found = [row["top1"] for row in rows if row["r"] and f"−{100 * (1 - row['r']['flops']):.0f} %" == cost]
        assert figures == [f"{value:.1f}" for value in found]
    assert len(shown) == 4


@pytest.mark.parametrize("config", MergeConfig._methods.values(), ids=lambda config: config.method)
def test_the_page_on_methods_names_every_one(config):
    page = (DOCS / "methods.md").read_text(encoding="utf-8")
    assert f"| {config.title} | `{config.__name__}(" in page and f"**{config.title}**" in page
