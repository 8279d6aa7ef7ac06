"""Runs in which the backbone learns too: what is kept of them, what is published, and that they resume."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, CLIPModel, GitForCausalLM, ViTForImageClassification

from dtem_hf import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForZeroShotImageClassification,
    MergeAdapter,
)
from dtem_hf.opening import load_processor
from dtem_hf.training.arguments import TrainArguments
from dtem_hf.training.program import train


END_TO_END = {"train_backbone": True, "backbone_lr": 1e-3, "layer_decay": 0.7}


def run(options, **changes):
    """Train; the folder of the run."""
    train(TrainArguments(**{**options, **END_TO_END, **changes}))
    return Path(options["output_dir"])


def test_checkpoints_hold_the_backbone_and_the_best_model_is_saved_merged(options):
    folder = run(options, steps=3, validate_every=3)
    checkpoint = load_file(folder / "checkpoints" / "step-00000003" / "model.safetensors")
    model = AutoModelForImageClassification.from_pretrained(folder / "model")
    assert checkpoint.keys() == dict(model.named_parameters()).keys()
    assert model.merge_config.r == 2 and load_processor(str(folder / "model")).size["height"] == 32
    adapter = MergeAdapter.from_pretrained(folder / "adapter")
    assert adapter.backbone.base_model is None  # it is not for the backbone that training began with
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        apart = AutoModelForImageClassification.from_pretrained(folder / "model", merge=str(folder / "adapter"))
        assert torch.equal(apart(pixels).logits, model(pixels).logits)
    start = ViTForImageClassification.from_pretrained(options["model"])
    assert all(
        not torch.equal(checkpoint[name], p) for name, p in start.named_parameters() if "k_proj.bias" not in name
    )


def test_resumed_run_ends_in_the_same_bits(options, tmp_path):
    """Dropout is on: its random numbers go on, too; mixing and erasing are drawn anew for every batch."""
    changes = {"task": "distillation", "mixup": 0.8, "augmentation": "trivialaugment", "checkpoint_every": 2}
    whole = run({**options, "output_dir": str(tmp_path / "whole")}, steps=4, **changes)
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "step-00000004")
    run({**options, "output_dir": str(cut)}, steps=4, **changes)
    name = Path("checkpoints", "step-00000004", "model.safetensors")
    expected, resumed = load_file(whole / name), load_file(cut / name)
    assert all(torch.equal(resumed[key], value) for key, value in expected.items())
    lines = [(folder / "metrics.jsonl").read_text().splitlines()[-2:] for folder in (whole, cut)]
    assert lines[0] == lines[1]


def test_what_a_killed_run_was_writing_is_removed_and_the_model_that_it_moved_aside_is_put_back(options):
    folder = run(options, steps=1, validate_every=1)
    before = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    (folder / ".model.0123abcd.tmp").mkdir()
    (folder / "model").rename(folder / ".model.0123abcd.tmp" / "old")
    for name in (".metrics.jsonl.0123abcd.tmp", "adapter/.merge_adapter.safetensors.0123abcd.tmp"):
        (folder / name).touch()
    run(options, steps=1, validate_every=1)
    assert sorted(path.relative_to(folder) for path in folder.rglob("*")) == before


def test_captioning_model_is_saved_with_its_tokenizer(caption_options, git_folder):
    folder = run({**caption_options, "model": str(git_folder), "task": "captioning"}, steps=2, validate_every=2)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert model.merge_config.r == 2 and AutoTokenizer.from_pretrained(folder / "model")("red")["input_ids"]
    start = GitForCausalLM.from_pretrained(git_folder)
    assert not torch.equal(model.output.weight, start.output.weight)


def test_dual_encoder_is_saved_whole_and_only_its_vision_part_has_learned(caption_options, clip_folder):
    options = {**caption_options, "model": str(clip_folder), "task": "contrastive"}
    folder = run(options, steps=8, validate_every=2, distillation_weight=0.0)
    model = AutoModelForZeroShotImageClassification.from_pretrained(folder / "model")
    assert model.merge_config.r == 2
    start = CLIPModel.from_pretrained(clip_folder)
    moved = {name for name, p in start.named_parameters() if not torch.equal(model.get_parameter(name), p)}
    assert moved and all(name.startswith("vision_model.") for name in moved)
