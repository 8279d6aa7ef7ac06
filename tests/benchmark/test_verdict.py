"""What the adviser says about figures that are given: which r to take, and whether it pays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dtem_hf.benchmark.tables import advice_page
from dtem_hf.benchmark.verdict import judge, pick, sentence


DOCS = Path(__file__).resolve().parents[2] / "docs"


def make_rows(
    speeds: dict[str, dict[tuple[str, int], float]], losses: dict[tuple[str, int], float], spread: float = 0.01
) -> list[dict[str, Any]]:
    """Rows of one batch size of 16, from images per second of every (method, r) in every runtime."""
    first = next(iter(speeds.values()))["none", 0]
    best = max(runtime["none", 0] for runtime in speeds.values())

    def around(value: float) -> dict[str, float]:
        return {"median": value, "q25": value * (1 - spread), "q75": value * (1 + spread)}

    return [
        {
            "runtime": runtime,
            "method": method,
            "r": r,
            "ratio": 1 - r / 32,
            "loss": losses.get((method, r), 0.0),
            "loss_interval": [losses.get((method, r), 0.0) / 2, losses.get((method, r), 0.0) * 2],
            "cosine": None,
            "batches": [
                {
                    "batch_size": 16,
                    "images_per_second": around(speed),
                    "speedup": around(speed / measured["none", 0]),
                    "over_best_plain": around(speed / best),
                    "over_first": around(speed / first),
                }
            ],
        }
        for runtime, measured in speeds.items()
        for (method, r), speed in measured.items()
    ]


LOSSES = {("tome", 8): 0.04, ("tome", 16): 0.2, ("dtem", 8): 0.03, ("dtem", 16): 0.09}
EAGER = {("none", 0): 10.0, ("tome", 8): 14.0, ("tome", 16): 21.0, ("dtem", 8): 13.0, ("dtem", 16): 20.0}


@pytest.mark.parametrize(
    ("max_loss", "picked"),
    [
        (1.0, ("dtem", 16)),  # both methods may merge 16, and this one loses less
        (0.09, ("dtem", 16)),
        (0.08, ("dtem", 8)),
        (0.03, ("dtem", 8)),
        (0.02, None),
    ],
)
def test_the_largest_r_within_the_loss_is_picked(max_loss: float, picked: Any) -> None:
    row = pick(make_rows({"eager": EAGER}, LOSSES), max_loss)
    assert (None if row is None else (row["method"], row["r"])) == picked


def advice_on(speeds: dict[str, Any], max_loss: float = 0.1, **options: Any) -> tuple[dict[str, Any], str]:
    rows = make_rows(speeds, LOSSES, **options)
    picked = pick(rows, max_loss)
    assert picked is not None
    verdict = judge(rows, picked, 0)
    return verdict, sentence(rows, picked, [verdict], max_loss)


def test_in_one_runtime_all_of_the_gain_is_merging_s() -> None:
    verdict, text = advice_on({"eager": EAGER})
    assert (verdict["speedup"], verdict["over_first"], verdict["merging_share"]) == (2.0, 2.0, 1.0)
    assert text == (
        "Take r = 16 (dtem), the largest that was tried: it gives 2.00× with 16 images at a time in eager "
        "(20.0 images/s); it changes the class of 9.0 % of the images (95 % interval 4.5 to 18.0 %)."
    )


def test_a_runtime_s_part_of_the_gain_is_not_merging_s() -> None:
    """Four times as fast by the runtime, and again by merging: each brings half of the factor of sixteen."""
    verdict, text = advice_on({"eager": EAGER, "graph": {**dict.fromkeys(EAGER, 40.0), ("dtem", 16): 160.0}})
    assert (verdict["runtime"], verdict["best_plain"], verdict["pays"]) == ("graph", "graph", True)
    assert verdict["merging_share"] == pytest.approx(0.5)
    assert "4.00× with 16 images at a time in graph" in text
    assert "16.00× unmerged eager, 50 % of that gain by merging" in text


def test_a_faster_unmerged_runtime_is_named() -> None:
    verdict, text = advice_on({"eager": EAGER, "graph": {**dict.fromkeys(EAGER, 25.0), ("dtem", 16): 19.0}})
    assert not verdict["pays"] and verdict["runtime"] == "eager"
    assert text.startswith("It does not pay here, because")
    assert "the fastest merged runtime, eager, makes 20.0 images/s, and the unmerged model 25.0 in graph" in text


def test_merging_that_is_slower_does_not_pay() -> None:
    verdict, text = advice_on({"eager": {**EAGER, ("dtem", 16): 8.0}})
    assert not verdict["pays"] and verdict["merging_share"] is None
    assert "eager has 0.80× the speed at 0.50 of the unmerged model's multiply-adds" in text


def test_a_gain_within_the_noise_is_none() -> None:
    verdict, text = advice_on({"eager": {**EAGER, ("dtem", 16): 11.0}}, spread=0.2)
    assert not verdict["pays"]
    assert "the gain of 1.10× over the unmerged model in eager is within the noise" in text
    assert advice_on({"eager": {**EAGER, ("dtem", 16): 11.0}}, spread=0.05)[0]["pays"]


def test_each_batch_size_has_its_verdict_in_the_sentence() -> None:
    rows = make_rows({"eager": EAGER}, LOSSES)
    picked = pick(rows, 0.1)
    assert picked is not None
    good = judge(rows, picked, 0)
    bad = {**good, "batch_size": 1, "pays": False, "because": "it is slow"}
    text = sentence(rows, picked, [bad, good], 0.1)
    assert "it gives 2.00× with 16 images at a time" in text
    assert text.endswith("; with one image at a time it does not pay, because it is slow.")


def test_only_the_largest_r_is_said_to_be_the_largest_tried() -> None:
    assert "tried" not in advice_on({"eager": EAGER}, max_loss=0.05)[1]


def test_no_r_within_the_loss_is_said_with_the_least_one() -> None:
    rows = make_rows({"eager": EAGER}, LOSSES)
    text = sentence(rows, pick(rows, 0.01), [], 0.01)
    assert "even r = 8 (dtem) changes the class of 3.0 % of the images (95 % interval 1.5 to 6.0 %), and" in text
    assert "max_loss=0.01 allows less" in text
    without_classes = [{**row, "cosine": 1 - row["loss"]} for row in rows]
    text = sentence(without_classes, None, [], 0.01)
    assert "even r = 8 (dtem) turns the features to a cosine of 0.970 (95 % interval 0.940 to 0.985), and" in text


@pytest.mark.parametrize("path", sorted(DOCS.glob("which-r/*/advice.json")), ids=lambda path: path.parent.name)
def test_the_page_quotes_what_the_command_wrote(path: Path) -> None:
    result = json.loads(path.read_text(encoding="utf-8"))
    assert path.with_suffix(".md").read_text(encoding="utf-8") == advice_page(result)
    picked = pick(result["rows"], result["max_loss"])
    assert picked is not None and (picked["method"], picked["r"]) == (result["method"], result["r"])
    assert result["verdicts"] == [judge(result["rows"], picked, place) for place in range(len(result["verdicts"]))]
    assert result["sentence"] == sentence(result["rows"], picked, result["verdicts"], result["max_loss"])
    page = (DOCS / "which-r.md").read_text(encoding="utf-8")
    assert result["sentence"] in page.replace("\n> ", " ") and f"`{result['command']}`" in page
    assert f"](which-r/{path.parent.name}/advice.md)" in page and f"](which-r/{path.parent.name}/advice.png)" in page
