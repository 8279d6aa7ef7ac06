"""Dense heads: maps and their figures against loops over patches and pixels, and what a user's head may return."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ViTModel

from dtem_hf import BadValue, DTEMConfig, ToMeConfig, attach
from dtem_hf.data.images import ProcessedImages, load_images
from dtem_hf.evaluation.dense import DenseArguments, evaluate_dense, main, map_error, map_iou, markdown
from dtem_hf.opening import load_processor
from tests.support.runs import flags


HEADS = """
import torch

WEIGHT = torch.linspace(-1, 1, 32)

def shade(patches):  # [B, 32, rows, columns]
    return torch.einsum("bdrc,d->brc", patches, WEIGHT).sigmoid()

def doubled(patches):
    return shade(patches).repeat_interleave(2, 1).repeat_interleave(3, 2).unsqueeze(1)

def two(patches):
    return torch.stack([shade(patches)] * 2, 1)

def none(patches):
    return None

module = torch.nn.Sequential(torch.nn.Conv2d(32, 1, 3, padding=1), torch.nn.Dropout(0.9), torch.nn.Sigmoid())
number = 3
"""


@pytest.fixture
def options(vit_folder: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Arguments of a small evaluation; the heads are in a module of the current folder."""
    (tmp_path / "my_dense_heads.py").write_text(HEADS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "my_dense_heads", raising=False)
    return {
        "model": str(vit_folder),
        "data": str(image_folder),
        "head": "my_dense_heads:shade",
        "methods": ["tome"],
        "r": ["2", "3"],
        "limit": 6,
        "batch_size": 4,
        "num_workers": 0,
        "output_dir": str(tmp_path / "out"),
    }


@torch.no_grad()
def test_a_row_is_what_loops_over_patches_and_pixels_find(options: dict[str, Any]) -> None:
    """Every patch gets the merged token that the source map names; maps are compared pixel by pixel."""
    result = evaluate_dense(DenseArguments(**options))
    images = ProcessedImages(load_images(options["data"], limit=6), load_processor(options["model"]))
    model = attach(ViTModel.from_pretrained(options["model"]).eval(), ToMeConfig(r=3), unmerge=False)
    weight = torch.linspace(-1, 1, 32)
    errors, overlaps = [], []
    for image in images:
        pixels = image["pixel_values"].unsqueeze(0)
        with model.trace_merging() as trace:
            merged = model(pixels).last_hidden_state[0]
        with model.unmerged():
            plain = model(pixels).last_hidden_state[0]
        source = trace.source_maps[-1][0]
        difference = both = either = 0.0
        for patch in range(1, 17):
            own = torch.sigmoid(merged[source[patch]] @ weight).item()
            other = torch.sigmoid(plain[patch] @ weight).item()
            difference += abs(own - other)
            both += own > 0.5 and other > 0.5
            either += own > 0.5 or other > 0.5
        errors.append(difference / 16)
        overlaps.append(both / either)
    row = result["rows"][2]
    assert (row["method"], row["r"]) == ("tome", 3)
    assert row["map_error"] == pytest.approx(sum(errors) / 6, abs=1e-6) and row["map_error"] > 1e-3
    assert row["iou"] == pytest.approx(sum(overlaps) / 6, abs=1e-6) and 0.5 < row["iou"] < 1
    assert row["map_error_interval"][0] < row["map_error"] < row["map_error_interval"][1]


def test_figures_of_maps_by_hand() -> None:
    reference = torch.tensor([[[0.9, 0.1], [0.6, 0.5]], [[0.0, 0.1], [0.2, 0.3]]])
    maps = torch.tensor([[[0.7, 0.8], [0.6, 0.5]], [[0.0, 0.1], [0.2, 0.3]]])
    torch.testing.assert_close(map_error(maps, reference), torch.tensor([0.9 / 4, 0.0]))
    # Of the first, two of three pixels are in both; of the second, none is in either.
    torch.testing.assert_close(map_iou(maps, reference, 0.5), torch.tensor([2 / 3, 1.0]))
    torch.testing.assert_close(map_iou(maps, reference, 0.15), torch.tensor([3 / 4, 1.0]))


def test_no_merging_changes_nothing_and_untrained_dtem_is_tome(options: dict[str, Any]) -> None:
    rows = evaluate_dense(DenseArguments(**{**options, "methods": ["tome", "dtem", "evit"], "r": ["0", "3"]}))["rows"]
    none, tome_0, tome, dtem_0, dtem, evit_0, evit = rows
    for row in (none, tome_0, dtem_0):
        assert (row["map_error"], row["iou"], row["ratio"]) == (0, 1, pytest.approx(1, abs=0.2))
    assert (dtem["map_error"], dtem["iou"]) == (tome["map_error"], tome["iou"]) and tome["map_error"] > 0
    # EViT keeps so many tokens that it costs no more than ToMe does at the same place.
    assert evit_0["r"]["keep_rate"] == 1 and evit["ratio"] <= tome["ratio"] < evit_0["ratio"]


def test_costs_are_those_of_the_images_and_not_of_the_configs_size(
    options: dict[str, Any], vit_folder: Path, tmp_path: Path
) -> None:
    load_processor(str(vit_folder)).__class__(size={"height": 48, "width": 32}).save_pretrained(tmp_path / "model")
    ViTModel.from_pretrained(vit_folder).save_pretrained(tmp_path / "model")
    result = evaluate_dense(
        DenseArguments(**{**options, "model": str(tmp_path / "model"), "methods": ["tome", "evit"]})
    )
    model = attach(ViTModel.from_pretrained(vit_folder), ToMeConfig(r=2))
    assert result["image_size"] == [48, 32]
    assert result["rows"][1]["multiply_adds"] == model.merge_plan((48, 32)).multiply_adds
    assert result["rows"][3]["ratio"] <= result["rows"][1]["ratio"]


@pytest.mark.parametrize("head", ["doubled", "module"])
def test_maps_of_any_size_and_modules(options: dict[str, Any], head: str) -> None:
    """A module runs in eval mode: with its dropout, the same row would differ from itself."""
    rows = evaluate_dense(DenseArguments(**{**options, "head": f"my_dense_heads:{head}", "r": ["0", "3"]}))["rows"]
    assert rows[1]["map_error"] == 0 < rows[2]["map_error"]
    if head == "doubled":
        plain = evaluate_dense(DenseArguments(**{**options, "r": ["0", "3"]}))["rows"]
        assert rows[2]["map_error"] == pytest.approx(plain[2]["map_error"], abs=1e-7)
        assert rows[2]["iou"] == pytest.approx(plain[2]["iou"], abs=1e-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": "my_dense_heads:two"}, r"my_dense_heads:two.*one map per image, \[4, H, W\], not \[4, 2, 4, 4\]"),
        ({"head": "my_dense_heads:none"}, "not NoneType"),
        ({"head": "my_dense_heads:number"}, "head='my_dense_heads:number': a function of my_dense_heads, which has"),
        ({"head": "shade"}, "head='shade': module:function"),
        ({"head": "no_such_heads:f"}, "ModuleNotFoundError"),
        ({"picture_r": "7"}, "picture_r='7': one of 2, 3"),
        ({"write_card": True}, "an adapter that is a local folder, not None"),
    ],
)
def test_what_does_not_fit_is_named(options: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadValue, match=message):
        evaluate_dense(DenseArguments(**{**options, **change}))


def test_the_command_writes_a_table_a_picture_and_a_card(
    options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = tmp_path / "adapter"
    attach(ViTModel.from_pretrained(options["model"]), DTEMConfig(r=2)).save_merge_adapter(adapter, "user/vit")
    other = tmp_path / "other"
    attach(ViTModel.from_pretrained(options["model"]), DTEMConfig(r=2, init="random")).save_merge_adapter(other)
    methods = {"methods": ["tome", "evit", "dtem"], "adapters": [str(adapter), str(other)], "pictures": 1}
    main(flags(options, **methods))
    result = json.loads((tmp_path / "out" / "dense.json").read_text())
    assert (tmp_path / "out" / "dense.md").read_text() == markdown(result)
    assert (tmp_path / "out" / "maps.jpg").read_bytes()[:2] == b"\xff\xd8"
    assert len(result["rows"]) == 1 + 4 * 2 and result["head"] == options["head"]
    assert {row.get("adapter") for row in result["rows"][5:]} == {str(adapter), str(other)}
    shown = capsys.readouterr().out
    assert all(f"{row['map_error']:.4f}" in shown for row in result["rows"])

    main(flags(options, methods=["tome", "dtem"], adapter=str(adapter), write_card=True, picture_data=options["data"]))
    record = json.loads((adapter / "evaluation.json").read_text())
    card = (adapter / "README.md").read_text()
    error, overlap = (record["rows"][4][name] for name in ("map_error", "iou"))
    assert f"| DTEM | r=3 | {error:.4f} | {overlap:.3f} |" in card and "Images/s" not in card
    assert "(maps.jpg)" in card and "AutoModel.from_pretrained" in card
