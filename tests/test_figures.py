"""The tables in docs that gather figures of several JSON files hold what those files hold."""

import json
import re
from pathlib import Path

import pytest


DOCS = Path(__file__).resolve().parents[1] / "docs"
CARDS = DOCS.parent / "model_cards"
METHODS = ("none", "tome", "dtem")


def load(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def table_below(page: str, text: str) -> dict[str, list[str]]:
    """The first table of a page below a text, without its head: the other cells of a row by the first one."""
    rest = (DOCS / page).read_text(encoding="utf-8").split(text)[1]
    lines = re.search(r"(?:^\|.*\n)+", rest, re.MULTILINE).group().splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first: others for first, *others in cells}


def evaluated(path: Path) -> dict[tuple[str, int], dict]:
    return {(row["method"], row["r"] or 0): row for row in load(path)["rows"]}


@pytest.mark.parametrize(
    "runtime, folder", [("eager in float32", "evaluation"), ("OpenVINO in bfloat16", "openvino-bfloat16")]
)
def test_top1_in_low_precision(runtime, folder):
    shown = table_below("performance.md", "## In low precision")
    rows = evaluated(DOCS / f"deit-tiny/{folder}/evaluation.json")
    found = [rows[method, 0 if method == "none" else 16]["top1"] for method in METHODS]
    assert shown[f"top-1, {runtime} ([JSON](deit-tiny/{folder}/evaluation.json))"] == [
        f"{value:.1f}" for value in found
    ]


@pytest.mark.parametrize("runtime, suffix", [("ONNX Runtime", "onnx"), ("OpenVINO", "openvino")])
def test_int8(runtime, suffix):
    shown = table_below("performance.md", "## In low precision")
    records = [load(DOCS / f"performance/int8/{method}-{suffix}.json") for method in METHODS]
    logits = [record["parity"]["outputs"]["logits"] for record in records]
    assert all(record["parity"]["images"] == 1000 for record in records)
    assert shown[f"same class as in float32, {runtime} in int8"] == [f"{each['agreement']:.1f} %" for each in logits]
    assert shown[f"KL to float32, {runtime} in int8"] == [f"{each['kl']:.3f}" for each in logits]


def test_adapters_beside_tome():
    one, mean = (evaluated(CARDS / name / "evaluation.json") for name in ("deit-tiny-sample", "deit-tiny-mean"))
    shifts = evaluated(DOCS / "deit-tiny/shifts/evaluation.json")
    shown = table_below("training.md", "On 1,000 images that were used neither")
    for r in (4, 8, 13, 16, 20):
        found = [mean["tome", r], one.get(("dtem", r)), shifts["dtem", r], mean["dtem", r]]
        cells = [f"{row['kl']:.4f}, {row['top1']:.1f}" if row else "–" for row in found]
        assert shown[str(r)] == [*cells, f"{mean['dtem', r]['kl'] / mean['tome', r]['kl']:.2f}"]


def test_losses_of_captions():
    pages = [load(DOCS / f"small-git/{name}.json")["comparisons"] for name in ("caption_loss", "caption_loss_coco")]
    shown = table_below("training.md", "## A captioning model")
    found = {
        str(first["r"]): [f"{each['dtem_minus_tome']:+.4f} ± {each['standard_error']:.4f}" for each in (first, second)]
        for first, second in zip(*pages, strict=True)
    }
    assert shown == found
