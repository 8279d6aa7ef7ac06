"""The comparison: its tables hold the figures of its rows, for every method that is registered."""

import csv
import json

import pytest
import torch

from dtem_hf import AutoModelForImageClassification, DTEMConfig, DTPSConfig, attach
from dtem_hf.evaluation import variants
from dtem_hf.evaluation.comparison import (
    ABLATION,
    CompareArguments,
    ablation_table,
    amount_name,
    csv_table,
    long_table,
    main,
    wide_table,
)


def row(method, r, top1, multiply_adds, **more):
    figures = {"top5": 99.0, "calibration_error": 3.0, "agreement": 80.0, "kl": 0.5}
    speed = {"images_per_second": 10.0, "speedup": 2.0, "ratio": multiply_adds / 4e9, "tokens": 9}
    return {"method": method, "r": r, "top1": top1, **figures, **speed, "multiply_adds": multiply_adds, **more}


def share(value):
    return {"kind": "flops", "flops": value, "slope": 0.0}


ROWS = [
    row("none", None, 80.0, 4e9),
    row("tome", share(0.65), 78.25, 2.6e9),
    row("tome", share(0.5), 75.0, 2e9),
    row("soft", share(0.65), 78.5, 4e9),
    row("soft", share(0.5), 76.0, 4e9),
    row("dtem", share(0.65), 79.5, 2.6e9, adapter="a|b"),
    row("dtem", share(0.5), 78.0, 2e9, adapter="a|b"),
    row("dtem", share(0.5), 70.0, 2e9, adapter="other"),
]


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]


def test_wide_table_has_a_line_per_method_and_a_column_per_amount():
    head, _, *lines = cells(wide_table(ROWS))
    assert head == ["Method", "unmerged", "−35 %", "−50 %"]
    assert lines == [
        ["ToMe", "80.00", "78.25 (−1.75)", "75.00 (−5.00)"],
        ["ToMe, merged softly", "80.00", "78.50 (−1.50)", "76.00 (−4.00)"],
        ["DTEM (a\\|b)", "80.00", "79.50 (−0.50)", "78.00 (−2.00)"],
        ["DTEM (other)", "80.00", "–", "70.00 (−10.00)"],
    ]


def test_intervals_stand_beside_changes_where_they_are_known():
    lines = [{**line, "change_interval": [-3.25, 0.5], "kl_interval": [0.4, 0.625]} for line in ROWS]
    assert cells(wide_table(lines))[2][2] == "78.25 (−1.75; −3.2 to +0.5)"
    head, _, *body = cells(long_table(lines))
    assert dict(zip(head, body[1], strict=True))["KL, 95 %"] == "0.4000 to 0.6250"
    assert "KL, 95 %" not in long_table(ROWS)


def test_long_table_has_every_row_with_its_cost():
    head, _, *lines = cells(long_table(ROWS))
    assert len(lines) == len(ROWS)
    shown = dict(zip(head, lines[1], strict=True))
    assert shown["Reduction"] == "−35 %" and shown["Multiply-adds"] == "2.600 G" and shown["Ideal"] == "1.54×"
    assert shown["Top-1"] == "78.25" and shown["ECE"] == "3.00"


def test_ablation_adds_one_part_per_line():
    assert cells(ablation_table(ROWS))[2:] == [
        ["ToMe", "78.25", "75.00"],
        ["+ soft merging", "78.50 (+0.25)", "76.00 (+1.00)"],
        ["+ decoupled embedding", "79.50 (+1.00)", "78.00 (+2.00)"],
    ]


def test_csv_holds_every_figure():
    read = list(csv.DictReader(csv_table(ROWS).splitlines()))
    assert [float(line["top1"]) for line in read] == [line["top1"] for line in ROWS]
    assert read[5]["adapter"] == "a|b" and read[1]["adapter"] == "" and read[1]["r"] == "−35 %"


@pytest.mark.parametrize(
    ("r", "name"), [(share(0.65), "−35 %"), (share(0.375), "−62.5 %"), (16, "r=16"), (None, "–"), ([1, 2], "r=[1, 2]")]
)
def test_amounts_are_named(r, name):
    assert amount_name(r) == name


def test_program_writes_all_forms_for_several_adapters(vit_folder, image_folder, tmp_path, capsys):
    for name in ("one", "two"):
        model = AutoModelForImageClassification.from_pretrained(vit_folder, merge=DTEMConfig(r=2, init="random"))
        model.save_merge_adapter(tmp_path / name)
    adapters = [str(tmp_path / "one"), str(tmp_path / "two")]
    options = ["--model", str(vit_folder), "--data", str(image_folder), "--limit", "9", "--batch_size", "4"]
    options += ["--flops", "0.8", "0.7", "--adapters", *adapters, "--num_workers", "0"]
    main([*options, "--methods", "none", "tome", "dtem", "--output_dir", str(tmp_path / "out")])
    result = json.loads((tmp_path / "out" / "comparison.json").read_text())
    rows = result["rows"]
    assert [(line["method"], line.get("adapter")) for line in rows] == [
        ("none", None),
        *[("tome", None)] * 2,
        *[("dtem", adapters[0])] * 2,
        *[("dtem", adapters[1])] * 2,
    ]
    for line, target in zip(rows[1:], [0.8, 0.7] * 3, strict=True):
        assert line["ratio"] <= target and line["multiply_adds"] < rows[0]["multiply_adds"]
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert wide_table(rows) in text and long_table(rows) in text and result["command"] in text
    assert (tmp_path / "out" / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert csv_table(rows) == (tmp_path / "out" / "comparison.csv").read_text()
    assert "ToMe" in capsys.readouterr().out


def test_ablation_runs_its_three_methods_and_soft_merging_saves_nothing(vit_folder, image_folder, tmp_path):
    arguments = ["--model", str(vit_folder), "--data", str(image_folder), "--limit", "4", "--flops", "0.7"]
    main([*arguments, "--ablation", "True", "--num_workers", "0", "--output_dir", str(tmp_path)])
    rows = json.loads((tmp_path / "comparison.json").read_text())["rows"]
    assert [line["method"] for line in rows] == ["none", *ABLATION]
    assert rows[2]["ratio"] == 1 and rows[2]["kl"] > 0 and rows[2]["kl"] != rows[1]["kl"]
    assert "+ decoupled embedding" in (tmp_path / "comparison.md").read_text()


def test_a_method_that_is_registered_is_compared_without_another_word(monkeypatch):
    monkeypatch.setitem(variants.METHODS, "halves", variants.METHODS["tome"])
    methods = CompareArguments(model="m", data="d").methods
    assert "tome" in methods and "halves" in methods and "soft" not in methods and "dtps" not in methods


def test_an_adapter_is_attached_for_its_own_method_alone(make_classifier):
    model, adapters = make_classifier(), {}
    for config in (DTEMConfig(r=2, init="random"), DTPSConfig(0.7)):
        adapters[config.method] = attach(make_classifier(), config).to_merge_adapter()
    rows = variants.make_variants(model, ["tome", "dtem", "soft", "dtps"], [], [0.7], adapters)
    assert [(row.method, row.model.merge_config.method) for row in rows[1:]] == [
        ("tome", "tome"),
        ("dtem", "dtem"),
        ("soft", "dtem"),
        ("dtps", "dtps"),
    ]
    for row in (rows[2], rows[4]):
        ours, theirs = row.model.to_merge_adapter().tensors, adapters[row.method].tensors
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    arguments = CompareArguments(model="m", data="d", methods=["none", "tome"], flops=[0.7])
    named = [row.method for row in arguments.make_variants(model, adapters)]
    assert named == ["none", "tome", "dtps"]  # it needs an adapter, and has one
    with pytest.warns(UserWarning, match="The adapter dtem is not measured: its method, dtem, is none of methods"):
        left = arguments.make_variants(model, {"dtem": adapters["dtem"]})
    assert [row.method for row in left] == ["none", "tome"]
    soft = rows[3].model.to_merge_adapter().tensors
    assert not torch.equal(soft["layers.0.weight"], adapters["dtem"].tensors["layers.0.weight"])
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match=r"methods='dtps': a method that needs no training, or an adapter"),
    ):
        variants.make_variants(model, ["dtps"], [], [0.7], {"dtem": adapters["dtem"]})
