"""OpenVINO: files that say what eager says, int8 by NNCF, and ties as in eager, for every form of a graph."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout

import pytest
import torch
from torch import Tensor, nn

from dtem_hf import BadValue, DTEMConfig, attach, ops
from dtem_hf.deploy.graph import INPUT_NAME, ImageGraph
from dtem_hf.deploy.onnx_runtime import OnnxRunner, write_onnx
from dtem_hf.deploy.openvino_runtime import OpenVinoRunner, write_openvino
from dtem_hf.deploy.program import FORMATS, ExportArguments, export, load_for_export, main
from dtem_hf.deploy.runtimes import make_run


pytest.importorskip("openvino", reason="the extra openvino is not installed")
pytest.importorskip("onnxscript")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def exported(shallow_vit_folder, tmp_path_factory):
    """The folder of a merged model in float32, and what the program printed."""
    folder, printed = tmp_path_factory.mktemp("openvino"), io.StringIO()
    options = ["--method", "tome", "--r", "3", "--formats", "openvino", "--device", "cpu"]
    with redirect_stdout(printed):
        main(["--model", str(shallow_vit_folder), *options, "--output_dir", str(folder)])
    return folder, printed.getvalue()


def test_files_their_record_and_optimums_layout(vit_folder, exported):
    folder, printed = exported
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "openvino_model.bin",
        "openvino_model.xml",
        "openvino_model.xml.json",
        "preprocessor_config.json",
    ]
    record = json.loads((folder / "openvino_model.xml.json").read_text())
    assert [file["name"] for file in record["files"]] == ["openvino_model.xml", "openvino_model.bin"]
    assert record["parity"]["outputs"]["logits"]["largest_difference"] < 1e-4 and "openvino" in record["versions"]
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["ViTForImageClassification"]
    assert "logits within" in printed

    model = load_for_export(ExportArguments(model=str(vit_folder), method="tome", r="3")).eval()
    run = OpenVinoRunner(folder / "openvino_model.xml", CPU)
    for count in (1, 3, 7):
        pixels = torch.randn(count, 3, 32, 32)
        torch.testing.assert_close(run(pixels)[0], model(pixels).logits, atol=1e-5, rtol=1e-5)


def test_half_of_the_weights_bytes(vit_folder, exported, tmp_path):
    settings = {"model": str(vit_folder), "method": "none", "dtype": "float16", "device": "cpu"}
    (record,) = export(ExportArguments(**settings, formats=["openvino"], output_dir=str(tmp_path)))
    assert record["parity"]["outputs"]["logits"]["largest_difference"] < 1e-4
    half, whole = ((folder / "openvino_model.bin").stat().st_size for folder in (tmp_path, exported[0]))
    assert half < 0.6 * whole


@pytest.mark.parametrize("kind", ["openvino", "onnx"])
def test_int8_says_what_it_changed(vit_folder, image_folder, tmp_path, kind, capsys):
    pytest.importorskip("nncf" if kind == "openvino" else "onnxruntime")
    options = ["--int8", str(image_folder), "--limit", "16", "--formats", kind, "--output_dir", str(tmp_path)]
    checked = ["--check", str(image_folder)] if kind == "onnx" else []
    main(["--model", str(vit_folder), "--method", "tome", "--r", "3", *options, *checked, "--device", "cpu"])
    name = FORMATS[kind]
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert (record["int8"]["images"], record["parity"]["images"]) == ((16, 48) if checked else (12, 4))
    figures = record["parity"]["outputs"]["logits"]
    # Another graph, or none of the weights, would change the logits by all of their size.
    assert 0 < figures["rms_from_float32"] < 0.5 * figures["float32_rms"]
    assert 0 <= figures["agreement"] <= 100 and figures["kl"] > 0
    assert f"on {record['parity']['images']} images" in capsys.readouterr().out
    if kind == "openvino":
        assert 'element_type="i8"' in (tmp_path / name).read_text()
        return
    import onnx

    graph = onnx.load(tmp_path / name).graph
    quantised = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    products = [node for node in graph.node if node.op_type in ("Gemm", "MatMul")]
    # The linear layers of the ViT: q, k, v, output and two of the MLP in each of 2 layers, and the classifier.
    assert sum(quantised.issuperset(node.input[:2]) for node in products) == 2 * 6 + 1
    assert [file["name"] for file in record["files"]] == ["model.onnx"]


def test_a_runtime_runs_a_merged_model_and_leaves_it_as_it_was(make_classifier):
    model = attach(make_classifier(num_hidden_layers=2), DTEMConfig(r=6, learn_shifts=True, relaxation="hard"))
    for name, parameter in model.named_parameters():
        if ".shifts." in name:
            parameter.data.normal_(0, 0.3)
    run = make_run("openvino", model, (3, 32, 32))
    pixels = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(run(pixels)[0], model(pixels).logits, atol=1e-5, rtol=1e-5)
    assert model.config._attn_implementation == "sdpa"


# Prefix tokens and all tokens of what is merged. With one prefix token, whole models are exported.
COUNTS = [(0, 20), (2, 197)]


class MergeAlone(ImageGraph):
    """Tokens as pixels [B, 1, N, D] -> for each of COUNTS, what is left of the first ones, and their sizes."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(1, 1))

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        merged = []
        for prefix, count in COUNTS:
            tokens = pixel_values[:, 0, :count]
            matching = ops.bipartite_soft_matching(tokens, (count - prefix) // 3, prefix)
            merged += ops.merge_tokens(tokens * torch.arange(count).view(1, -1, 1), None, matching)
        return tuple(merged)


@pytest.mark.parametrize("form", ops.forms.MERGE_FORMS)
def test_ties_are_merged_as_in_eager(tmp_path, form):
    """Tokens that are copies of four unit vectors: almost all scores are ties, and each token bears its number."""
    draw = torch.Generator().manual_seed(3)
    tokens = torch.eye(4)[torch.randint(4, (5, 1, 197), generator=draw)]
    graph = MergeAlone()
    batch = {INPUT_NAME: {0: torch.export.Dim("batch", min=1)}}
    with ops.merge_form(form), torch.no_grad():
        program = torch.export.export(graph, (), {INPUT_NAME: tokens}, dynamic_shapes=batch)
    names = [f"{name}_{i}" for i in range(len(COUNTS)) for name in ("x", "sizes")]
    if form == "openvino":
        write_openvino(program, tmp_path / "merge.xml", names)
        run = OpenVinoRunner(tmp_path / "merge.xml", CPU)
    else:
        write_onnx(program, tmp_path / "merge.onnx", names)
        pytest.importorskip("onnxruntime")
        run = OnnxRunner(tmp_path / "merge.onnx", CPU)
    for count in (1, 5):
        torch.testing.assert_close(list(run(tokens[:count])), list(graph(tokens[:count])), atol=1e-5, rtol=1e-5)


def test_what_openvino_cannot_do_here_is_named(exported, image_folder):
    with pytest.raises(BadValue, match="dtype='bfloat16'"):
        ExportArguments(model="m", formats=["openvino"], dtype="bfloat16")
    with pytest.raises(BadValue, match="int8"):
        ExportArguments(model="m", formats=["aot_inductor"], int8=str(image_folder))
    path = exported[0] / "openvino_model.xml"
    with pytest.raises(BadValue, match="device='cuda'"):
        OpenVinoRunner(path, torch.device("cuda"))
    with pytest.raises(BadValue, match=r"dtype='float8'.*float32"):
        OpenVinoRunner(path, CPU, "float8")


@torch.no_grad()
def test_torch_compiles_with_openvino_as_its_backend(make_classifier, pixels):
    """One graph for every batch above one, as of a plain model."""
    pytest.importorskip("openvino.torch")
    # The second layer attends by sizes; a second merge would add no operator.
    model = attach(make_classifier(num_hidden_layers=2), DTEMConfig(r=[9, 0]))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options = {"aot_autograd": True, "config": {"INFERENCE_PRECISION_HINT": "f32"}}
    compiled = torch.compile(model, backend="openvino", dynamic=True, fullgraph=True, options=options)
    for count in (2, 3):
        torch.testing.assert_close(compiled(pixels[:count]).logits, model(pixels[:count]).logits, atol=1e-5, rtol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
