"""Plots, read back from the SVG: which texts stand in it, and where its points are."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from dtem_hf.labels import series_name
from dtem_hf.report.plots import pareto_front, plot_accuracy, plot_pareto, plot_training


SVG = "{http://www.w3.org/2000/svg}"


def row(method, r, top1, agreement, multiply_adds):
    return {"method": method, "r": r, "top1": top1, "agreement": agreement, "multiply_adds": multiply_adds}


ROWS = [
    row("none", None, 78.5, 100.0, 1_258_000_000),
    row("tome", 16, 74.0, 85.0, 636_000_000),
    row("tome", 8, 76.9, 92.0, 927_000_000),
    row("dtem", 8, 77.6, 94.0, 930_000_000),
    row("dtem", 16, 75.6, 89.0, 639_000_000),
    row("dtem", {"kind": "flops", "flops": 0.4}, 72.1, 83.0, 503_000_000),
]


def texts(path) -> list[str]:
    """All texts of a figure; matplotlib draws them as paths, and writes each as a comment beside."""
    return re.findall(r"<!-- (.*?) -->", path.read_text(encoding="utf-8"))


def points(path) -> list[tuple[float, float]]:
    """Where markers are drawn in the axes, in the figure's units, without ticks and legend."""
    found = []

    def walk(element: ElementTree.Element, inside: str) -> None:
        name = element.get("id", "")
        inside = f"{inside}/{name}" if name else inside
        drawn = element.tag == f"{SVG}use" and element.get("x") is not None
        if drawn and not any(part in inside for part in ("axis", "legend", "text")):
            found.append((float(element.get("x")), float(element.get("y"))))
        for child in element:
            walk(child, inside)

    walk(ElementTree.parse(path).getroot(), "")
    return found


@pytest.mark.parametrize("measure", ["top1", "agreement"])
def test_points_lie_where_the_rows_say(tmp_path, measure):
    rows = ROWS if measure == "top1" else [{**r, "top1": None} for r in ROWS]
    plot_accuracy(rows, tmp_path / "p.svg")
    drawn = np.array(sorted(points(tmp_path / "p.svg")))
    expected = np.array(sorted((r["multiply_adds"] / 1e9, r[measure]) for r in rows))
    assert len(drawn) == len(rows)
    for axis, direction in ((0, 1), (1, -1)):  # SVG counts downwards
        slope, offset = np.polyfit(expected[:, axis], drawn[:, axis], 1)
        assert slope * direction > 0
        np.testing.assert_allclose(drawn[:, axis], slope * expected[:, axis] + offset, atol=0.01)


def test_texts_name_axes_methods_and_r(tmp_path):
    plot_accuracy(ROWS, tmp_path / "p.svg", title="A $title_ at 50 %")
    found = texts(tmp_path / "p.svg")
    for text in (
        "Multiply-adds per image (G)",
        "Top-1 accuracy (%)",
        "DTEM",
        "ToMe",
        "unmerged (78.5 %)",
        "flops=0.4",
    ):
        assert text in found, text
    assert found.count("r=8") == 2 and found.count("r=16") == 2
    assert "A $title_ at 50 %" in found


def test_without_labels_agreement_is_drawn(tmp_path):
    plot_accuracy([{**r, "top1": None} for r in ROWS], tmp_path / "p.svg")
    found = texts(tmp_path / "p.svg")
    assert "Agreement with the unmerged model (%)" in found and "Top-1 accuracy (%)" not in found
    assert "unmerged (100.0 %)" in found


def test_small_models_are_counted_in_millions(tmp_path):
    plot_accuracy([{**r, "multiply_adds": r["multiply_adds"] // 1000} for r in ROWS], tmp_path / "p.svg")
    assert "Multiply-adds per image (M)" in texts(tmp_path / "p.svg")


def test_unknown_methods_get_different_styles(tmp_path):
    rows = [row(f"new{i}", r, 70.0 + i, 90.0, 10**9 + r) for i in range(5) for r in (4, 8)]
    plot_accuracy(rows, tmp_path / "p.svg")
    assert {f"new{i}" for i in range(5)} <= set(texts(tmp_path / "p.svg"))


def test_the_same_colours_for_the_same_methods(tmp_path):
    for name, rows in (("both", ROWS), ("alone", [r for r in ROWS if r["method"] == "dtem"])):
        plot_accuracy(rows, tmp_path / f"{name}.png")
        page = np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")).reshape(-1, 3)
        assert (page == (0x00, 0x72, 0xB2)).all(axis=1).sum() > 100  # Okabe and Ito's blue
        assert bool((page == (0xD5, 0x5E, 0x00)).all(axis=1).sum() > 100) == (name == "both")


def test_nothing_to_plot_and_unknown_formats_are_refused(tmp_path):
    (tmp_path / "p.png").write_bytes(b"old")
    with pytest.raises(ValueError, match="at least one row"):
        plot_accuracy([], tmp_path / "p.png")
    with pytest.raises(ValueError, match="path="):
        plot_accuracy(ROWS, tmp_path / "p")
    assert [p.name for p in tmp_path.iterdir()] == ["p.png"] and (tmp_path / "p.png").read_bytes() == b"old"


def test_pareto_front_is_what_no_other_point_beats():
    draw = np.random.default_rng(0)
    for _ in range(200):
        costs, qualities = draw.integers(0, 6, 8).tolist(), draw.integers(0, 6, 8).tolist()
        expected = [
            i
            for i in range(8)
            if not any(
                costs[j] <= costs[i]
                and qualities[j] >= qualities[i]
                and (costs[j], qualities[j]) != (costs[i], qualities[i])
                for j in range(8)
            )
        ]
        assert pareto_front(costs, qualities) == expected


def test_pareto_plot_has_a_line_per_method_and_adapter(tmp_path):
    rows = [
        {"method": method, "adapter": adapter, "r": None if method == "none" else 8, "top1": top1, "agreement": 90.0}
        | {"multiply_adds": cost, "images_per_second": 1e10 / cost}
        for method, adapter, top1, cost in [
            ("none", None, 80.0, 4e9),
            ("tome", None, 76.0, 2e9),
            ("dtem", "first $x_", 78.0, 2e9),
            ("dtem", "second", 77.0, 3e9),
        ]
    ]
    assert len({series_name(row) for row in rows}) == 4
    plot_pareto(rows, tmp_path / "p.svg", title="50 % of $y_")
    text = (tmp_path / "p.svg").read_text()
    assert text.startswith("<?xml")
    plot_pareto([{**row, "images_per_second": None} for row in rows], tmp_path / "narrow.png")
    plot_pareto(rows, tmp_path / "wide.png")
    wide, narrow = (Image.open(tmp_path / f"{name}.png").width for name in ("wide", "narrow"))
    assert wide == 2 * narrow
    with pytest.raises(ValueError, match="at least one row"):
        plot_pareto([], tmp_path / "none.png")


def test_ways_to_train_are_points_at_their_share_of_the_first(tmp_path):
    plot_training([("first", [0.2, 0.4]), ("half", [0.1, 0.2])], [8, 16], tmp_path / "t.svg")
    written = texts(tmp_path / "t.svg")
    assert {"first", "half", "r = 8", "r = 16"} <= set(written)
    # The better row stands above; its points are left of the first's, at half of the way to 0.
    (half, first) = sorted({round(y, 3) for _, y in points(tmp_path / "t.svg")})
    by_row = {y: sorted(x for x, at in points(tmp_path / "t.svg") if round(at, 3) == y) for y in (half, first)}
    assert max(by_row[half]) < min(by_row[first])
    with pytest.raises(ValueError, match="rows"):
        plot_training([], [8], tmp_path / "t.svg")
