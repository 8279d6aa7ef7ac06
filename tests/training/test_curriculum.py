"""What changes from step to step: by the seed and the step alone, and never when the model is measured."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from dtem_hf import AutoModelForImageClassification, BadValue, DTEMConfig, MergeAdapter
from dtem_hf.errors import AdapterError
from dtem_hf.hub.adapter import mean_adapter
from dtem_hf.training.arguments import TrainArguments
from dtem_hf.training.parameters import freeze_backbone
from dtem_hf.training.program import train
from tests.support.training_processes import logged


def curriculum(options, **changes):
    return TrainArguments(**{**options, **changes})


def test_without_options_every_step_is_as_the_config_says(options):
    plain = curriculum(options)
    assert {repr(plain.config_at(step)) for step in range(6)} == {repr(plain.merge_config())}


def test_r_is_drawn_evenly_and_by_step(options):
    drawn = [curriculum(options, sample_r=[1, 2, 3], steps=600).config_at(step).r for step in range(600)]
    again = [curriculum(options, sample_r=[1, 2, 3], steps=600).config_at(step).r for step in range(600)]
    assert drawn == again
    assert all(150 < count < 250 for count in Counter(drawn).values()) and len(set(drawn)) == 3
    other = [curriculum(options, sample_r=[1, 2, 3], steps=600, seed=1).config_at(step).r for step in range(600)]
    assert other != drawn


def test_plans_are_drawn_as_well(options):
    falling = {"kind": "linear", "r": 3, "slope": 0.5}
    found = curriculum(options, sample_r=["2", "[3, 2, 1, 0]", json.dumps(falling)], steps=30)
    drawn = {repr(found.config_at(step).schedule) for step in range(30)}
    assert drawn == {repr(DTEMConfig(r=r).schedule) for r in (2, [3, 2, 1, 0], falling)}


def test_temperatures_fall_by_the_same_factor_every_step(options):
    steps = [curriculum(options, last_score_temperature=0.01, steps=5).config_at(step) for step in range(5)]
    temperatures = [step.score_temperature for step in steps]
    assert temperatures == pytest.approx([0.1 * 0.1 ** (i / 4) for i in range(5)])
    assert {step.assignment_temperature for step in steps} == {0.1}


def test_straight_through_begins_at_its_step(options):
    relaxations = [curriculum(options, straight_through_from=2).config_at(step).relaxation for step in range(4)]
    assert relaxations == ["auto", "auto", "straight_through", "straight_through"]


def test_straight_through_removes_tokens_and_reaches_the_embedding(vit_folder):
    config = DTEMConfig(r=2, relaxation="straight_through")
    model = AutoModelForImageClassification.from_pretrained(vit_folder, merge=config)
    hard = AutoModelForImageClassification.from_pretrained(vit_folder, merge=DTEMConfig(r=2)).eval()
    freeze_backbone(model)
    pixels = torch.randn(3, 3, 32, 32)
    with model.trace_merging() as trace:
        logits = model(pixels).logits
    assert [size.shape[1] for size in trace.sizes] == [15, 13, 11, 9]
    torch.testing.assert_close(logits, hard(pixels).logits, rtol=1e-4, atol=1e-5)
    logits.logsumexp(-1).sum().backward()
    # What is merged in the last layer reaches no class: it happens behind the CLS token's last look at the others.
    norms = [layer.weight.grad.norm().item() for layer in model.vit.merge_embedding.projections]
    assert all(norm > 0 for norm in norms[:-1]) and norms[-1] == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"sample_r": [1, 2, 3]},
        {"last_score_temperature": 0.05, "last_assignment_temperature": 0.2},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_runs_learn_and_are_measured_as_they_will_be_used(changes, options):
    """From a random start that is not near the best already, as that of some seeds is."""
    summary = train(TrainArguments(**{**options, **changes, "steps": 60, "lr": 0.02, "init": "random", "seed": 2}))
    lines = logged(options["output_dir"])
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 60 and sum(losses[-20:]) < sum(losses[:20])
    adapter = MergeAdapter.from_pretrained(Path(options["output_dir"], "adapter"))
    assert adapter.config == DTEMConfig(r=2, init="random")
    assert summary["best_validation"]["kl"] < lines[0]["validation"]["kl"]


def test_a_last_phase_of_straight_through_learns_from_the_hard_loss(options):
    """Its training loss is the hard model's own KL: what validation finds for the same images."""
    data = {"validation_data": options["data"], "validation_size": 4, "batch_size": 4}
    run = {**options, **data, "steps": 2, "straight_through_from": 1, "lr": 1e-9, "validate_every": 1}
    train(TrainArguments(**run, task="distillation"))
    soft, hard = logged(options["output_dir"], "loss")
    assert 0 < hard < 0.5 and hard != pytest.approx(soft, rel=1e-3)


def test_a_run_goes_on_from_an_adapter(options, tmp_path):
    first = train(TrainArguments(**{**options, "steps": 20, "init": "random", "lr": 0.02, "validate_every": 20}))
    adapter = str(Path(options["output_dir"], "adapter"))
    second = {**options, "start_from": adapter, "steps": 1, "output_dir": str(tmp_path / "second")}
    train(TrainArguments(**second))
    assert logged(second["output_dir"], "validation")[0]["kl"] == pytest.approx(
        first["best_validation"]["kl"], rel=1e-4
    )


def test_a_run_goes_on_from_the_mean_of_adapters(options, tmp_path):
    model, folders = AutoModelForImageClassification.from_pretrained(options["model"], merge=DTEMConfig(r=3)), []
    for parts in range(3):
        for parameter in model.merge_parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        folders.append(str(tmp_path / str(parts)))
        model.save_merge_adapter(folders[-1])
    train(TrainArguments(**{**options, "start_from": folders, "steps": 1, "lr": 1e-12, "validate_every": 1}))
    found = MergeAdapter.from_pretrained(Path(options["output_dir"], "adapter")).tensors
    started = [MergeAdapter.from_pretrained(folder).tensors for folder in folders]
    for key, value in found.items():
        torch.testing.assert_close(value, sum(each[key] for each in started) / 3, rtol=1e-6, atol=1e-6)


def test_adapters_of_two_shapes_have_no_mean(options, tmp_path):
    for width in (4, 8):
        config = DTEMConfig(r=3, embed_dim=width, init="random")
        model = AutoModelForImageClassification.from_pretrained(options["model"], merge=config)
        model.save_merge_adapter(tmp_path / str(width))
    two = [MergeAdapter.from_pretrained(tmp_path / str(width)) for width in (4, 8)]
    with pytest.raises(AdapterError, match=r"layers\.0\.bias: .*\[\(4,\), \(8,\)\]"):
        mean_adapter(two)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample_r": [-1]}, r"sample_r=\[-1\]"),
        ({"sample_r": ["many"]}, "sample_r='many'"),
        ({"sample_r": ['{"kind": "odd"}']}, "sample_r=.*a kind among"),
        ({"last_score_temperature": 0.0}, r"last_score_temperature=0\.0"),
        ({"straight_through_from": -1}, "straight_through_from=-1"),
    ],
)
def test_refusals(change, message, options):
    with pytest.raises(BadValue, match=message):
        TrainArguments(**{**options, **change})
