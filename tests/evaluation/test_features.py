"""Encoders without a head: features and their neighbours against loops over single images, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    SiglipConfig,
    SiglipModel,
    SiglipVisionModel,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
    VivitConfig,
    VivitModel,
)
from typer.testing import CliRunner

from dtem_hf import BadValue, DTEMConfig, FlopsSchedule, ToMeConfig, attach
from dtem_hf.cli import app
from dtem_hf.data.images import ProcessedImages, load_images
from dtem_hf.evaluation import classification, comparison, features
from dtem_hf.evaluation.classification import EvaluateArguments, evaluate, main
from dtem_hf.evaluation.features import nearest, vote
from dtem_hf.opening import load_processor
from dtem_hf.report.page import read_section
from dtem_hf.report.tables import table_of
from tests.support.runs import flags, watch


SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 50}


def saved(model: Any, folder: Path, vit_folder: Path) -> Path:
    """A model with weights so large that merging changes its features, in a folder with the small ViT's processor."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    load_processor(str(vit_folder)).save_pretrained(folder)
    return folder


@pytest.fixture
def encoder_folder(vit_folder: Path, tmp_path: Path) -> Path:
    """A DINOv2 whose config names larger images than its processor makes, as the published ones do."""
    return saved(Dinov2Model(Dinov2Config(**{**SMALL, "image_size": 48})), tmp_path / "dinov2", vit_folder)


@pytest.fixture
def options(encoder_folder: Path, image_folder: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": str(encoder_folder),
        "data": str(image_folder),
        "methods": ["tome"],
        "r": ["3"],
        "batch_size": 7,
        "num_workers": 0,
        "output_dir": str(tmp_path / "out"),
    }


@torch.no_grad()
def features_of(model: Any, options: dict[str, Any], read: Any) -> tuple[list[list[float]], list[int]]:
    """Features and labels, one image at a time; `read` takes them from a model's output."""
    images = ProcessedImages(load_images(options["data"]), load_processor(options["model"]))
    items = [images[i] for i in range(len(images))]
    found = [read(model.eval()(item["pixel_values"][None]))[0].double().tolist() for item in items]
    return found, [item["labels"] for item in items]


def cosine(a: list[float], b: list[float]) -> float:
    length = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / length


def by_nearness(vectors: list[list[float]], i: int, among: list[int]) -> list[int]:
    return sorted((j for j in among if j != i), key=lambda j: -cosine(vectors[i], vectors[j]))


def elected(labels: list[int]) -> int:
    """The label that most of them have; of several such, the one that comes first."""
    return max(labels, key=lambda label: (labels.count(label), -labels.index(label)))


def figures_of(vectors: Any, plain: Any, labels: list[int], k: int) -> dict[str, float]:
    everyone = list(range(len(vectors)))
    known = [i for i in everyone if labels[i] >= 0]
    asked = [i for i in known if [labels[j] for j in known].count(labels[i]) > 1]
    right = [elected([labels[j] for j in by_nearness(vectors, i, known)[:k]]) == labels[i] for i in asked]
    same = [by_nearness(vectors, i, everyone)[0] == by_nearness(plain, i, everyone)[0] for i in everyone]
    return {
        "cosine": sum(cosine(a, b) for a, b in zip(vectors, plain, strict=True)) / len(plain),
        "same_nearest": 100 * sum(same) / len(same),
        "knn_top1": 100 * sum(right) / len(right),
    }


def test_rows_equal_loops_over_images(options: dict[str, Any]) -> None:
    share = FlopsSchedule(0.7)
    given = {**options, "methods": ["tome", "dtem"], "flops": [0.7], "neighbours": 4}
    result = evaluate(EvaluateArguments(**given))
    rows = result["rows"]
    plain, labels = features_of(Dinov2Model.from_pretrained(options["model"]), options, lambda out: out.pooler_output)
    for row, merge in zip(rows[1:3], (ToMeConfig(r=3), ToMeConfig(r=share)), strict=True):
        model = attach(Dinov2Model.from_pretrained(options["model"]), merge)
        vectors, _ = features_of(model, options, lambda out: out.pooler_output)
        for name, value in figures_of(vectors, plain, labels, k=4).items():
            assert row[name] == pytest.approx(value, abs=1e-6), name
        assert row["cosine"] < 0.999 and row["same_nearest"] < 100
        assert row["multiply_adds"] == model.merge_plan((32, 32)).multiply_adds
        low, high = row["cosine_interval"]
        assert low < row["cosine"] < high
    first = figures_of(plain, plain, labels, k=4)
    assert [rows[0][name] for name in ("cosine", "same_nearest", "knn_top1")] == pytest.approx(list(first.values()))
    assert rows[0]["change_interval"] == [0, 0] and rows[2]["ratio"] <= 0.7
    # Without an adapter, dtem starts from keys; its embedding takes a part of the multiply-adds.
    assert rows[3]["cosine"] == pytest.approx(rows[1]["cosine"], abs=1e-6) and rows[4]["ratio"] <= 0.7
    asked = ("task", "features", "neighbours", "image_size")
    assert [result[name] for name in asked] == ["image-feature-extraction", "auto", 4, [32, 32]]
    assert result["data"]["labelled"] and result["data"]["num_images"] == 48


@pytest.mark.parametrize(
    ("make", "tower"),
    [
        (lambda: CLIPModel(CLIPConfig(vision_config=SMALL, text_config=TEXT)), CLIPVisionModel),
        (lambda: SiglipModel(SiglipConfig(vision_config=SMALL, text_config=TEXT)), SiglipVisionModel),
        (lambda: CLIPVisionModel(CLIPVisionConfig(**SMALL)), CLIPVisionModel),
    ],
    ids=["clip", "siglip", "clip's tower alone"],
)
def test_the_image_tower_of_a_dual_encoder(
    make: Any, tower: Any, options: dict[str, Any], vit_folder: Path, tmp_path: Path
) -> None:
    folder = saved(make(), tmp_path / "dual", vit_folder)
    options = {**options, "model": str(folder)}
    row = evaluate(EvaluateArguments(**options))["rows"][1]
    plain, labels = features_of(tower.from_pretrained(folder), options, lambda out: out.pooler_output)
    merged = attach(tower.from_pretrained(folder), ToMeConfig(r=3))
    vectors, _ = features_of(merged, options, lambda out: out.pooler_output)
    for name, value in figures_of(vectors, plain, labels, k=5).items():
        assert row[name] == pytest.approx(value, abs=1e-6), name


def test_images_without_labels_have_neighbours_and_no_votes(options: dict[str, Any]) -> None:
    labelled = evaluate(EvaluateArguments(**options))
    bare = evaluate(EvaluateArguments(**{**options, "label_column": "none"}))
    assert not bare["data"]["labelled"]
    for ours, theirs in zip(bare["rows"], labelled["rows"], strict=True):
        assert ours["knn_top1"] is None and ours["change_interval"] is None and theirs["knn_top1"] is not None
        assert (ours["cosine"], ours["same_nearest"]) == (theirs["cosine"], theirs["same_nearest"])
        ((*_, votes, _, _, _, _),) = table_of([ours])[1]
        assert votes == "–"


@pytest.mark.parametrize(("limit", "neighbours"), [(7, 5), (3, 1)], ids=["too few", "each its own label"])
def test_too_few_labels_for_a_vote_are_said(
    options: dict[str, Any], limit: int, neighbours: int, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = evaluate(EvaluateArguments(**options, limit=limit, neighbours=neighbours))["rows"]
    assert all(row["knn_top1"] is None and row["same_nearest"] is not None for row in rows)
    assert f"no k-NN top-1: it needs more than {neighbours} labelled images" in capsys.readouterr().err


def test_a_single_label_is_no_vote(options: dict[str, Any], image_folder: Path, tmp_path: Path) -> None:
    """As of the first images of a data set that is sorted by class."""
    (tmp_path / "data").mkdir()
    for i in range(8):
        (tmp_path / "data" / f"{i}.png").write_bytes((image_folder / f"{i}.png").read_bytes())
    (tmp_path / "data" / "labels.csv").write_text("file,label\n" + "".join(f"{i}.png,2\n" for i in range(8)))
    result = evaluate(EvaluateArguments(**{**options, "data": str(tmp_path / "data")}))
    assert result["data"]["labelled"] and result["rows"][1]["knn_top1"] is None


def test_one_image_has_no_neighbour(options: dict[str, Any]) -> None:
    row = evaluate(EvaluateArguments(**options, limit=1))["rows"][1]
    assert row["same_nearest"] is None and row["cosine"] == pytest.approx(row["cosine_interval"][0])


def test_features_that_are_asked_for_of_a_model_with_a_head(options: dict[str, Any], vit_folder: Path) -> None:
    options = {**options, "model": str(vit_folder)}
    row = evaluate(EvaluateArguments(**options, features="cls"))["rows"][1]
    plain, labels = features_of(ViTModel.from_pretrained(vit_folder), options, lambda out: out[0][:, 0])
    merged = attach(ViTModel.from_pretrained(vit_folder), ToMeConfig(r=3))
    vectors, _ = features_of(merged, options, lambda out: out[0][:, 0])
    for name, value in figures_of(vectors, plain, labels, k=5).items():
        assert row[name] == pytest.approx(value, abs=1e-6), name
    assert "top1" in evaluate(EvaluateArguments(**options, resume="never"))["rows"][1]


def without(folder: Path, target: Path, vit_folder: Path, key: str) -> Path:
    """A copy of a checkpoint without the tensors whose names begin so."""
    target.mkdir()
    (target / "config.json").write_text((folder / "config.json").read_text())
    load_processor(str(vit_folder)).save_pretrained(target)
    kept = {name: value for name, value in load_file(folder / "model.safetensors").items() if not name.startswith(key)}
    save_file(kept, target / "model.safetensors", {"format": "pt"})
    return target


def test_a_checkpoint_that_lost_its_head_is_an_encoder_and_that_is_said(
    options: dict[str, Any], vit_folder: Path, tmp_path: Path
) -> None:
    headless = without(vit_folder, tmp_path / "headless", vit_folder, "classifier")
    run = CliRunner().invoke(app, ["evaluate", *flags({**options, "model": str(headless)})])
    assert run.exit_code == 0
    (said,) = [line for line in run.stderr.splitlines() if "features are measured" in line]
    assert said.endswith("this one lacks classifier.bias, which would be random; its features are measured instead.")
    row = json.loads((tmp_path / "out" / "evaluation.json").read_text())["rows"][1]
    own = {**options, "model": str(vit_folder), "output_dir": str(tmp_path / "own")}
    expected = evaluate(EvaluateArguments(**own, features="cls"))["rows"][1]
    assert row["cosine"] == pytest.approx(expected["cosine"], abs=1e-9) and row["cosine"] < 0.999


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"runtime": "onnxruntime"}, "runtime='onnxruntime': eager: other runtimes do not measure features"),
        ({"features": "grid"}, "features='grid': one of auto, pooled, cls, patches"),
        ({"neighbours": 0}, "neighbours=0: 1 or more"),
        ({"methods": ["magic"]}, "not magic"),
    ],
)
def test_options_that_do_not_suit_features_are_named(
    options: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadValue, match=message):
        evaluate(EvaluateArguments(**{**options, **change}))


def test_no_feature_is_random(options: dict[str, Any], vit_folder: Path, tmp_path: Path) -> None:
    """A pooler or a layer that the checkpoint lacks, and what is drawn anew in every pass."""
    headless = without(vit_folder, tmp_path / "headless", vit_folder, "classifier")
    with pytest.raises(BadValue, match=r"a trained encoder, and this one lacks pooler\.dense\.bias"):
        evaluate(EvaluateArguments(**{**options, "model": str(headless)}, features="pooled"))
    broken = without(Path(options["model"]), tmp_path / "broken", vit_folder, "encoder.layer.1.norm1")
    with pytest.raises(BadValue, match=r"a trained encoder, and this one lacks encoder\.layer\.1\.norm1\.bias"):
        evaluate(EvaluateArguments(**{**options, "model": str(broken)}))
    video = VivitConfig(**{**SMALL, "patch_size": 8, "tubelet_size": [2, 8, 8], "num_frames": 4})
    mae = ViTMAEConfig(**SMALL)
    for model in (VivitModel(video), ViTMAEModel(mae)):
        folder = saved(model, tmp_path / type(model).__name__, vit_folder)
        with pytest.raises(BadValue, match=f"an encoder of whole images, and {type(model).__name__} takes"):
            evaluate(EvaluateArguments(**{**options, "model": str(folder)}))


def test_a_comparison_is_of_classifiers(options: dict[str, Any]) -> None:
    with pytest.raises(BadValue, match=r"this one lacks classifier\.bias.*`dtem-hf evaluate` measures an encoder"):
        comparison.main(flags({**options, "flops": ["0.7"]}))


def test_an_interrupted_run_goes_on_where_it_stopped(options: dict[str, Any], monkeypatch: Any) -> None:
    expected = evaluate(EvaluateArguments(**options))["rows"]
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        watch(patched, classification, "measure_features", stop_behind=3)
        evaluate(EvaluateArguments(**options))
    with pytest.raises(BadValue, match=r"features='cls': the unfinished run in .* has 'auto'"):
        evaluate(EvaluateArguments(**options, features="cls"))
    later = watch(monkeypatch, classification, "measure_features")
    rows = evaluate(EvaluateArguments(**options))["rows"]
    assert len(later) == 4  # of seven batches
    for name in ("cosine", "same_nearest", "knn_top1", "cosine_interval", "change_interval"):
        assert [row[name] for row in rows] == [row[name] for row in expected]


def test_the_program_writes_json_table_plot_and_card(
    options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = tmp_path / "adapter"
    attach(Dinov2Model.from_pretrained(options["model"]), DTEMConfig(r=2)).save_merge_adapter(adapter, "user/dinov2")
    main(flags({**options, "methods": ["dtem"], "adapter": str(adapter), "write_card": True}))
    record = json.loads((adapter / "evaluation.json").read_text())
    row = record["rows"][1]
    assert f"{row['cosine']:.4f}" in capsys.readouterr().out
    assert (adapter / "features.png").read_bytes().startswith(b"\x89PNG") and not (adapter / "accuracy.png").exists()
    card = (adapter / "README.md").read_text()
    assert f"| DTEM | r=3 | {row['same_nearest']:.2f} | {row['knn_top1']:.2f} | {row['cosine']:.4f} |" in card
    assert "(features.png)" in card and "AutoModel.from_pretrained" in card and "Agreement" not in card
    assert "pipeline_tag: image-feature-extraction" in card
    ((columns, lines),) = read_section(adapter).tables
    shown = dict(zip(columns, lines[1], strict=True))
    assert shown["same nearest"] == f"{row['same_nearest']:.1f}" and shown["share"] == f"{row['ratio']:.3f}"


def test_nearest_and_votes_equal_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks of 4 of 11 images."""
    monkeypatch.setattr(features, "_CHUNK", 4)
    vectors = torch.randn(11, 6) * torch.rand(11, 1)
    found = nearest(vectors, 3)
    assert found.tolist() == [by_nearness(vectors.double().tolist(), i, list(range(11)))[:3] for i in range(11)]
    labels = np.random.default_rng(0).integers(0, 3, size=(60, 5))
    assert vote(labels).tolist() == [elected(line) for line in labels.tolist()]
    assert vote(np.array([[4, 1, 1, 4, 2], [3, 1, 2, 0, 5], [7, 1, 1, 7, 1]])).tolist() == [4, 3, 1]
