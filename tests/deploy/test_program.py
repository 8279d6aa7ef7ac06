"""Exported models: files that say what eager says, for any batch, whole or not at all."""

from __future__ import annotations

import copy
import hashlib
import json
from typing import Any

import pytest
import torch
from transformers import ViTModel

from dtem_hf import BadValue, ToMeConfig, attach, ops
from dtem_hf.deploy.graph import ImageGraph, export_graph, output_names
from dtem_hf.deploy.onnx_runtime import OnnxRunner
from dtem_hf.deploy.parity import check_parity
from dtem_hf.deploy.program import ExportArguments, export, export_format, load_for_export, main
from dtem_hf.errors import UnsupportedModelError
from dtem_hf.models.vision import image_shape
from tests.support.command_line import TINY


@pytest.fixture
def merged(make_classifier: Any) -> Any:
    return attach(make_classifier(num_hidden_layers=2), ToMeConfig(r=6))


def test_an_onnx_file_and_its_record(vit_folder, tmp_path, capsys):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    main(
        ["--model", str(vit_folder), "--method", "tome", "--r", "3", "--output_dir", str(tmp_path), "--device", "cpu"]
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "model.onnx",
        "model.onnx.json",
        "preprocessor_config.json",
    ]
    record = json.loads((tmp_path / "model.onnx.json").read_text())
    assert record["opset"] == 20 and record["merge"]["r"] == 3 and record["plan"]["tokens"] == [14, 11]
    file = record["files"][0]
    assert file["sha256"] == hashlib.sha256((tmp_path / "model.onnx").read_bytes()).hexdigest()
    assert record["parity"]["outputs"]["logits"]["largest_difference"] < 1e-4
    assert "logits within" in capsys.readouterr().out
    # Not every runtime has a scatter that adds.
    assert not any(node.op_type.startswith("Scatter") for node in onnx.load(tmp_path / "model.onnx").graph.node)

    arguments = ExportArguments(model=str(vit_folder), method="tome", r="3")
    model = load_for_export(arguments).eval()
    run = OnnxRunner(tmp_path / "model.onnx", torch.device("cpu"))
    for count in (1, 3):
        pixels = torch.randn(count, 3, 32, 32)
        torch.testing.assert_close(run(pixels)[0], model(pixels).logits, atol=1e-5, rtol=1e-5)


def test_all_forms_of_merging_give_the_same_and_one_of_them_without_a_scatter(make_bare):
    """All tokens that one layer leaves."""
    merged = attach(make_bare(num_hidden_layers=1), ToMeConfig(r=6))
    merged.set_attn_implementation("eager")
    pixels = torch.randn(4, 3, 32, 32)
    expected = ImageGraph(merged)(pixels)
    for form in ops.forms.MERGE_FORMS:
        with ops.merge_form(form):
            program = export_graph(merged, (3, 32, 32))
        names = [str(node.target) for node in program.graph.nodes]
        assert any("scatter" in name or "index_add" in name for name in names) == (form != "one_hot")
        torch.testing.assert_close(program.module()(pixel_values=pixels), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(BadValue, match="merge_form"), ops.merge_form("sparse"):
        pass


def test_a_file_that_fails_its_check_is_not_written(one_layer_vit_folder, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    settings = {"model": str(one_layer_vit_folder), "method": "none", "output_dir": str(tmp_path), "device": "cpu"}
    arguments = ExportArguments(**settings)
    model = load_for_export(arguments).eval()
    (tmp_path / "model.onnx").write_text("what was there before")

    def off(self: OnnxRunner, pixels: torch.Tensor) -> list[torch.Tensor]:
        return [value + 0.01 for value in right(self, pixels)]

    right = OnnxRunner.__call__
    monkeypatch.setattr(OnnxRunner, "__call__", off)
    with pytest.raises(BadValue, match="tolerance"):
        export_format(arguments, model, "onnx", torch.device("cpu"))
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_text() == "what was there before"


def test_bfloat16_in_onnx_is_refused_where_nothing_runs_it(one_layer_vit_folder, tmp_path):
    pytest.importorskip("onnxruntime")
    settings = {"model": str(one_layer_vit_folder), "method": "none", "dtype": "bfloat16", "device": "cpu"}
    with pytest.raises(BadValue, match=r"dtype='bfloat16'.*float32 or float16"):
        export(ExportArguments(**settings, output_dir=str(tmp_path)))
    assert not list(tmp_path.iterdir())
    (record,) = export(ExportArguments(**settings, output_dir=str(tmp_path), unchecked=True))
    assert record["parity"] is None and "bfloat16" in record["unchecked_because"]
    assert (tmp_path / "model.onnx").is_file()


def test_what_cannot_be_one_graph_says_so(make_classifier):
    model = make_classifier(num_hidden_layers=1)

    class Branching(torch.nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    model.vit.layernorm = Branching()
    with pytest.raises(UnsupportedModelError, match="one graph"):
        export_graph(model, (3, 32, 32))


def test_parity_is_found_and_missed(merged):
    shape = image_shape(merged)
    names = output_names(merged, torch.zeros(1, *shape))
    assert shape == (3, 32, 32) and names == ["logits"]
    same = check_parity(merged, ImageGraph(merged), names, shape)
    assert same["outputs"]["logits"] == {"largest_difference": 0.0}

    def other(pixels: torch.Tensor) -> list[torch.Tensor]:
        return [ImageGraph(merged)(pixels.flip(-1))[0]]

    with pytest.raises(BadValue, match="largest_difference"):
        check_parity(merged, other, names, shape)
    half = merged.bfloat16()
    assert check_parity(half, ImageGraph(half), names, shape)["outputs"]["logits"]["rms_from_float32"] > 0
    with pytest.raises(BadValue, match="rms_from_float32"):
        check_parity(half, other, names, shape)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"formats": ["tensorrt"]}, "formats"),
        ({"formats": []}, "formats"),
        ({"dtype": "int8"}, "dtype"),
        ({"merge_form": "sparse"}, "merge_form"),
        ({"attention": "flash_attention_2"}, "attention"),
        ({"method": "pool"}, "method"),
        ({"check": "images"}, "check"),
        ({"method": "tome", "merge": "a/b"}, "method"),
        ({"r": "4", "flops": 0.5}, "r, flops"),
        ({"r": "4", "method": "none"}, "r, flops"),
        ({"tolerance": 0}, "tolerance"),
        ({"output_dir": "./m"}, "output_dir='./m': another folder than the model's"),
    ],
)
def test_bad_options_are_named(change, message):
    with pytest.raises(BadValue, match=message):
        ExportArguments(model="m", **change)


@pytest.mark.parametrize("opset", [17, 99])
def test_an_opset_that_cannot_be_written_is_refused_before_the_model_is_loaded(opset):
    pytest.importorskip("onnxscript")
    with pytest.raises(BadValue, match=f"opset={opset}: one that onnxscript writes"):
        export(ExportArguments(model="nowhere", opset=opset))


def test_an_untrained_method_is_refused(vit_folder):
    with pytest.raises(BadValue, match="method='dtps': a method that needs no training"):
        load_for_export(ExportArguments(model=str(vit_folder), method="dtps"))


def test_a_checkpoint_without_its_head_is_refused(tmp_path):
    config = copy.deepcopy(TINY)
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "model")
    config.architectures = ["ViTForImageClassification"]
    config.save_pretrained(tmp_path / "model")
    arguments = ExportArguments(model=str(tmp_path / "model"), method="tome", output_dir=str(tmp_path / "out"))
    with pytest.raises(BadValue, match=r"lacks 2 weights of ViTForImageClassification, such as classifier\.bias"):
        export(arguments)
    assert not (tmp_path / "out").exists()
    config.architectures = ["ViTModel"]
    config.save_pretrained(tmp_path / "model")
    with pytest.warns(UserWarning, match=r"lacks pooler\.dense\.bias: the output of the pooler is random"):
        load_for_export(arguments)


@pytest.mark.parametrize("method", ["none", "tome"])
def test_images_smaller_than_a_patch_are_refused(vit_folder, tmp_path, method):
    arguments = ExportArguments(model=str(vit_folder), method=method, image_size=1, output_dir=str(tmp_path / "out"))
    with pytest.raises(BadValue, match="image_size=1: at least one patch of"):
        export(arguments)
    assert not (tmp_path / "out").exists()


def test_help_shows_the_commands(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "--formats onnx openvino" in capsys.readouterr().out
