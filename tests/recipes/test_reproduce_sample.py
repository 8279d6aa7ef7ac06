"""The recipe that makes the sample adapter again: end to end on small stand-ins, and against the published record."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ViTForImageClassification, ViTImageProcessorPil

from dtem_hf import AutoModelForImageClassification, BadValue, DTEMConfig, MergeAdapter, ToMeConfig, attach
from dtem_hf.data.images import ProcessedImages, collate, load_images
from dtem_hf.hub.folder_card import folder_card
from dtem_hf.opening import load_processor
from dtem_hf.programs.arguments import parse_arguments
from dtem_hf.training.arguments import TrainArguments
from recipes import reproduce_sample as recipe


ROOT = Path(__file__).resolve().parents[2]


@torch.no_grad()
def kept(model_folder: Path, merge: Any, r: int, images: Any) -> dict[str, float]:
    """KL to the unmerged model and top-1, from logits in float64."""
    merged = AutoModelForImageClassification.from_pretrained(model_folder, merge=merge).eval()
    merged.set_reduction(r)
    plain = ViTForImageClassification.from_pretrained(model_folder).eval()
    batch = collate(images)
    p, q = (model(batch["pixel_values"]).logits.double().log_softmax(-1) for model in (plain, merged))
    known = batch["labels"] >= 0
    hits = (q.argmax(-1) == batch["labels"])[known]
    return {"kl": float((p.exp() * (p - q)).sum(-1).mean()), "top1": 100 * float(hits.double().mean())}


@pytest.mark.usefixtures("any_precision")
def test_it_trains_measures_writes_the_card_and_resumes(
    make_classifier: Any, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, published, output = tmp_path / "model", tmp_path / "published", tmp_path / "out"
    model = make_classifier()
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    attach(model, DTEMConfig(r=2, init="random")).save_merge_adapter(published)
    data = ["--model", str(folder), "--train", str(image_folder), "--dev", str(image_folder)]
    command = [*data, "--published", str(published), "--output_dir", str(output), "--steps", "2", "--limit", "16"]
    recipe.main(command)
    adapter = output / "deit_tiny_sample_aggregation" / "adapter"
    config = MergeAdapter.from_pretrained(adapter).config
    assert config.learn_exponents and config.learn_norms
    training = json.loads((adapter / "training.json").read_text())
    assert training["steps"] == 2 and training["arguments"]["relaxation"] == "hard"
    assert (adapter / "README.md").read_text() == folder_card(adapter)

    record = json.loads((output / "reproduction.json").read_text())
    assert record["training_seconds"].keys() == {"deit_tiny_sample", "deit_tiny_sample_aggregation"}
    assert [row["r"] for row in record["rows"]] == [8, 13, 16, 20] and record["data"]["num_images"] == 16
    processed = ProcessedImages(load_images(str(image_folder), limit=16), load_processor(str(folder)))
    images = [processed[i] for i in range(16)]
    sides = {"tome": ToMeConfig(r=8), "published": str(published), "rebuilt": str(adapter)}
    for row in record["rows"]:
        for side, merge in sides.items():
            expected = kept(folder, merge, row["r"], images)
            assert {name: row[side][name] for name in expected} == pytest.approx(expected, abs=2e-5)
        assert row["kl_difference"] == row["rebuilt"]["kl"] - row["published"]["kl"] != 0
    evaluation = json.loads((adapter / "evaluation.json").read_text())
    assert [row["kl"] for row in evaluation["rows"][5:]] == [row["rebuilt"]["kl"] for row in record["rows"]]

    capsys.readouterr()
    before = (adapter / "merge_adapter.safetensors").read_bytes()
    recipe.main(command)
    assert capsys.readouterr().out.count("resuming from") == 2
    assert (adapter / "merge_adapter.safetensors").read_bytes() == before


def test_the_second_stage_is_what_the_published_adapter_was_trained_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    published = json.loads((ROOT / "model_cards/deit-tiny-sample/training.json").read_text())["arguments"]
    folder = "runs/deit-tiny-sample/adapter"
    options = recipe._training(recipe.ReproduceArguments(), recipe.STAGES[1], ["--start_from", folder])
    now = dataclasses.asdict(options)
    now["output_dir"] = parse_arguments(
        TrainArguments, ["--config", "recipes/configs/deit_tiny_sample_aggregation.yaml"], ""
    ).output_dir
    # It was trained when False was the default, which is what None comes to for a classifier.
    assert published.pop("unmerge") is False and now["unmerge"] is None
    assert [published.pop("start_from")] == now["start_from"]  # it was one word
    assert {name: now[name] for name in published} == published


def test_a_published_adapter_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadValue, match=r"published=.*the folder of an adapter"):
        recipe.ReproduceArguments(published=str(tmp_path / "none"))
