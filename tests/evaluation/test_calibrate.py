"""The search for a plan as a program: what it writes, and that the plan is the one it says."""

import json

import pytest
import torch
from PIL import Image

from dtem_hf import AutoModelForImageClassification, BadValue, DTEMConfig, MergeAdapter
from dtem_hf.evaluation.calibrate import CalibrateArguments, main


LEARN = {"learn_exponents": True, "learn_norms": True}


@pytest.fixture
def common(vit_folder, image_folder):
    return ["--model", str(vit_folder), "--data", str(image_folder), "--num_images", "12", "--evaluations", "8"]


def test_an_adapter_gets_its_plan_and_keeps_its_tensors(vit_folder, common, tmp_path, capsys):
    model = AutoModelForImageClassification.from_pretrained(vit_folder, merge=DTEMConfig(r=3, init="random", **LEARN))
    for name, parameter in model.named_parameters():
        if "exponents" in name or "norms" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_merge_adapter(tmp_path / "adapter")
    main([*common, "--adapter", str(tmp_path / "adapter"), "--r", "2", "--output_dir", str(tmp_path / "found")])
    before, after = (MergeAdapter.from_pretrained(tmp_path / name) for name in ("adapter", "found"))
    record = json.loads((tmp_path / "found" / "calibration.json").read_text())
    model.set_reduction(2)
    assert record["flops"] <= model.merge_plan().ratio
    model.set_reduction(record["reductions"])
    assert model.merge_plan().ratio == record["flops"]
    assert record["distance"] <= record["even_distance"] and record["evaluations"] <= 8
    assert (
        list(
            AutoModelForImageClassification.from_pretrained(vit_folder, merge=str(tmp_path / "found"))
            .merge_plan()
            .reductions
        )
        == record["reductions"]
    )
    assert after.tensors.keys() == before.tensors.keys() and "exponents.3" in after.tensors
    assert all(torch.equal(after.tensors[key], before.tensors[key]) for key in before.tensors)
    assert "r per layer" in capsys.readouterr().out
    main([*common, "--adapter", str(tmp_path / "found"), "--r", "2", "--output_dir", str(tmp_path / "adapter")])
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert f'"r": {MergeAdapter.from_pretrained(tmp_path / "adapter").config.to_dict()["r"]}' in card


def test_a_method_without_an_adapter_gets_a_config(vit_folder, common, tmp_path):
    main([*common, "--method", "tome", "--flops", "0.8", "--output_dir", str(tmp_path)])
    record = json.loads((tmp_path / "calibration.json").read_text())
    config = json.loads((tmp_path / "merge_config.json").read_text())
    assert config["method"] == "tome" and record["flops"] <= 0.8


def test_an_encoder_is_compared_by_the_features_that_are_named(vit_folder, common, tmp_path):
    main([*common, "--method", "tome", "--flops", "0.8", "--features", "grid", "--output_dir", str(tmp_path)])
    record = json.loads((tmp_path / "calibration.json").read_text())
    assert record["features"] == "grid" and 0 < record["distance"] <= record["even_distance"] < 2
    with pytest.raises(BadValue, match=r"a trained encoder, and this one lacks pooler\.dense\.bias"):
        main([*common, "--method", "tome", "--flops", "0.8", "--features", "pooled", "--output_dir", str(tmp_path)])
    with pytest.raises(BadValue, match="features='middle': one of auto, pooled"):
        CalibrateArguments(model="m", data="d", method="tome", features="middle")


def test_a_head_that_is_named_is_what_counts(vit_folder, common, tmp_path, monkeypatch):
    (tmp_path / "heads_to_calibrate.py").write_text("def first(patches):\n    return patches[:, 0].sigmoid()\n")
    monkeypatch.chdir(tmp_path)
    head = ["--head", "heads_to_calibrate:first", "--output_dir", str(tmp_path / "found")]
    main([*common, "--method", "tome", "--flops", "0.8", *head])
    record = json.loads((tmp_path / "found" / "calibration.json").read_text())
    assert record["head"] == "heads_to_calibrate:first" and 0 < record["distance"] <= record["even_distance"] < 1


def test_labels_are_not_read(vit_folder, tmp_path):
    """Folders of classes that the model does not have are images like any others."""
    for name in ("oak", "train", "elm"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32), (len(name) * 40, 80, 20)).save(tmp_path / "images" / name / "a.png")
    common = ["--model", str(vit_folder), "--data", str(tmp_path / "images"), "--evaluations", "2"]
    main([*common, "--method", "tome", "--r", "2", "--output_dir", str(tmp_path / "found")])
    assert json.loads((tmp_path / "found" / "calibration.json").read_text())["data"]["num_images"] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "adapter, method"),
        ({"adapter": "a", "method": "tome"}, "adapter, method"),
        ({"method": "tome", "r": "3", "flops": 0.5}, "r, flops"),
        ({"method": "tome", "num_images": 0}, "num_images=0: 1 or more"),
        ({"method": "tome", "evaluations": 0}, "evaluations=0: 1 or more"),
        ({"method": "tome", "batch_size": -1}, "batch_size=-1: 1 or more"),
        ({"method": "tome", "head": "a:b", "features": "cls"}, "features='cls': auto or grid"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(BadValue, match=message):
        CalibrateArguments(model="m", data="d", **options)
