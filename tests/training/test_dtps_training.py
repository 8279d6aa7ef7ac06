"""The trainer with method dtps: what is added to a task's loss, what a run leaves, and what it refuses."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dtem_hf import AutoModelForImageClassification, BadValue, DTEMConfig, DTPSConfig, MergeAdapter
from dtem_hf.training.arguments import TrainArguments
from dtem_hf.training.parameters import drawn_for
from dtem_hf.training.program import train


@pytest.fixture
def dtps(options):
    """Arguments of a run of a few steps: 16 patches, of which 8 and then 4 are kept."""
    return {**options, "r": None, "method": "dtps", "keep_rate": 0.5, "layers": [1, 2]}


@pytest.mark.parametrize("task", ["distillation", "classification"])
def test_the_kept_shares_miss_is_added_to_the_loss(task, dtps, make_run):
    run = make_run({**dtps, "task": task, "distillation_weight": 0.5})
    batch = run.data.collate([run.data.train[0, i] for i in range(12)])
    labelled = torch.tensor([label >= 0 for label in batch["labels"].tolist()])
    batch = {name: value[labelled] for name, value in batch.items()}
    with drawn_for(batch, run.arguments), run.model.trace_merging() as trace:
        loss = run.task.loss(run.model, run.model, batch).item()
    misses = [
        (rate - sum(size > 0.5 for size in row[1:]) / 16) ** 2
        for rate, layer in ((0.5, 0), (0.25, 1))
        for row in trace.sizes[layer].tolist()
    ]
    with torch.no_grad(), drawn_for(batch, run.arguments):
        logits = run.model(pixel_values=batch["pixel_values"]).logits.log_softmax(-1)
    with torch.no_grad(), run.model.unmerged():
        target = run.model(pixel_values=batch["pixel_values"]).logits.log_softmax(-1)
    divergence = (target.exp() * (target - logits)).sum() / len(logits)
    cross_entropy = -sum(row[label] for row, label in zip(logits, batch["labels"], strict=True)) / len(logits)
    expected = divergence if task == "distillation" else cross_entropy + 0.5 * divergence
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    found, norm = run._backward(batch, 1.0)
    assert sum(misses) > 0 and norm > 0
    assert found.item() == pytest.approx(loss + 2 * sum(misses) / len(misses), rel=1e-5)


def test_a_run_learns_and_leaves_an_adapter_for_use(dtps, make_run):
    """Its predictors keep better patches than those that are drawn at random do, on the images that they saw."""
    changes = {"steps": 40, "validate_every": 40, "batch_size": 20, "lr": 0.02, "checkpoint_every": 40}
    record = train(TrainArguments(**{**dtps, **changes}))
    assert record["best_step"] == 40 and record["arguments"]["method"] == "dtps" and record["arguments"]["r"] is None
    adapter = MergeAdapter.from_pretrained(Path(dtps["output_dir"], "adapter"))
    assert adapter.config == DTPSConfig(0.5, [1, 2])
    images = make_run({**dtps, "output_dir": f"{dtps['output_dir']}-unused"}).data.train
    pixels = torch.stack([images[0, i]["pixel_values"] for i in range(len(images))])
    model = AutoModelForImageClassification.from_pretrained(dtps["model"], merge=adapter)

    @torch.no_grad()
    def divergence():
        with model.unmerged():
            target = model(pixels).logits.log_softmax(-1)
        return (target.exp() * (target - model(pixels).logits.log_softmax(-1))).sum().item() / len(pixels)

    with model.trace_merging() as trace:
        learned = divergence()
    assert [sizes.shape[1] for sizes in trace.sizes] == [9, 5, 5, 5]
    drawn = []
    for _ in range(10):
        for parameter in model.merge_parameters():
            parameter.data.normal_()
        drawn.append(divergence())
    assert learned < 0.8 * sum(drawn) / len(drawn)


@pytest.mark.parametrize(
    "changes", [{}, {"train_backbone": True, "gradient_checkpointing": True}], ids=["frozen", "all"]
)
def test_resumed_run_ends_in_the_same_bits(changes, dtps, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(TrainArguments(**{**dtps, **changes, "steps": 4, "output_dir": str(whole)}))
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "step-00000004")
    train(TrainArguments(**{**dtps, **changes, "steps": 4, "output_dir": str(cut)}))
    name = Path("checkpoints", "step-00000004", "model.safetensors")
    expected, resumed = load_file(whole / name), load_file(cut / name)
    assert all(torch.equal(resumed[key], value) for key, value in expected.items())
    start = load_file(whole / "checkpoints" / "step-00000002" / "model.safetensors")
    assert all(not torch.equal(start[key], value) for key, value in expected.items() if "predictors" in key)


@pytest.mark.parametrize(
    "name, value",
    [
        ("r", "16"),
        ("embed_dim", 8),
        ("init", "keys"),
        ("relaxation", "hard"),
        ("top_k", 3),
        ("learn_norms", True),
        ("learn_shifts", False),
        ("sample_r", ["8", "16"]),
        ("last_score_temperature", 0.05),
        ("straight_through_from", 0),
    ],
)
def test_options_of_dtem_are_refused(name, value, dtps):
    with pytest.raises(BadValue, match=rf"^{name}={re.escape(repr(value))}: no value: method dtps"):
        TrainArguments(**{**dtps, name: value})


def test_options_of_dtps_are_refused_with_dtem(options):
    for name, value in (("keep_rate", 0.7), ("layers", [1, 2])):
        with pytest.raises(BadValue, match=rf"^{name}={re.escape(repr(value))}: no value: method dtem"):
            TrainArguments(**{**options, name: value})
    with pytest.raises(BadValue, match="method='tome': one of dtem, dtps"):
        TrainArguments(**{**options, "method": "tome"})
    with pytest.raises(BadValue, match=r"keep_rate=1\.5"):
        TrainArguments(**{**options, "r": None, "method": "dtps", "keep_rate": 1.5})


def test_fisher_tasks_are_for_pairs(dtps, make_run):
    with pytest.raises(BadValue, match="method='dtps': dtem with task fisher"):
        make_run({**dtps, "task": "fisher"})


@pytest.mark.parametrize("task, folder", [("captioning", "blip_folder"), ("contrastive", "clip_folder")])
def test_tasks_on_captions_take_a_step(task, folder, dtps, caption_options, make_run, request):
    captions = {name: caption_options[name] for name in ("data", "captions")}
    run = make_run({**dtps, **captions, "model": str(request.getfixturevalue(folder)), "task": task})
    before = [parameter.detach().clone() for parameter in run.model.merge_parameters()]
    loss, norm = run._backward(run.data.collate([run.data.train[0, i] for i in range(4)]), 1.0)
    assert loss.isfinite() and norm > 0
    moved = [not torch.equal(old, new) for old, new in zip(before, run.model.merge_parameters(), strict=True)]
    assert all(moved) and len(moved) == 2 * 10


def test_features_are_learned_from(dtps, make_run):
    run = make_run({**dtps, "task": "feature_distillation"})
    _, norm = run._backward(run.data.collate([run.data.train[0, i] for i in range(4)]), 1.0)
    assert norm > 0


def test_what_is_left_out_is_what_the_configs_say(options, dtps):
    left_out = TrainArguments(**{**options, "r": None})
    assert (left_out.r, left_out.merge_config()) == ("16", DTEMConfig())
    assert TrainArguments(**dtps).merge_config() == DTPSConfig(0.5, [1, 2])
