"""The training program: what it leaves alone, what it learns, and that an interruption changes nothing."""

import os
import random
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import ViTForImageClassification

from dtem_hf import AutoModelForImageClassification, BadValue, DTEMConfig, MergeAdapter
from dtem_hf.data.images import ProcessedImages, collate, load_images
from dtem_hf.opening import load_processor
from dtem_hf.training.arguments import TrainArguments
from dtem_hf.training.parameters import freeze_backbone
from dtem_hf.training.program import train
from dtem_hf.training.run import Run
from tests.support.children import Child, run_python
from tests.support.training_processes import logged


ROOT = Path(__file__).parents[2]


def learned(output_dir):
    """The embedding in the last checkpoint of a run (the adapter is the best, which may be an earlier one)."""
    newest = sorted(Path(output_dir, "checkpoints").glob("step-*"))[-1]
    return newest.name, load_file(newest / "model.safetensors")


def test_backbone_is_untouched_and_gets_no_gradients(options):
    run = Run(TrainArguments(**options))
    before = {name: p.detach().clone() for name, p in run.model.named_parameters() if "merge_embedding" not in name}
    run.train()
    for name, parameter in run.model.named_parameters():
        if "merge_embedding" in name:
            assert parameter.requires_grad, name
        else:
            assert torch.equal(parameter, before[name]), name
            assert parameter.grad is None and not parameter.requires_grad, name


def test_no_activation_in_front_of_the_first_merge_is_kept_for_backward(vit_folder):
    """Nothing of the embeddings and of the first layer's attention needs a gradient when the backbone is frozen."""
    model = AutoModelForImageClassification.from_pretrained(vit_folder, merge=DTEMConfig(r=2))
    freeze_backbone(model)
    seen = {}
    model.vit.layers[0].attention.register_forward_hook(lambda m, i, o: seen.update(first=o[0].requires_grad))
    model.vit.layers[1].attention.register_forward_hook(lambda m, i, o: seen.update(second=o[0].requires_grad))
    model(torch.randn(2, 3, 32, 32))
    assert seen == {"first": False, "second": True}


def test_frozen_backbone_is_one_fixed_function_while_merging_is_soft(vit_folder):
    """The fixture's dropout must not fire, and the merge must be the soft one."""
    model = AutoModelForImageClassification.from_pretrained(vit_folder, merge=DTEMConfig(r=2))
    plain = ViTForImageClassification.from_pretrained(vit_folder)
    freeze_backbone(model)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        soft, again = model(pixels).logits, model(pixels).logits
        with model.unmerged():
            unmerged = model(pixels).logits
        assert torch.equal(soft, again)
        assert torch.equal(unmerged, plain(pixels).logits)
        with model.trace_merging() as trace:
            model(pixels)
    assert trace.sizes[-1].shape[1] == 17  # softly merged tokens stay


@pytest.mark.parametrize("task", ["distillation", "classification"])
def test_loss_falls(options, task, image_folder, tmp_path):
    if task == "classification":  # every image needs a label there
        data = tmp_path / "labelled"
        data.mkdir()
        images = load_images(str(image_folder))
        processed = ProcessedImages(images, load_processor(options["model"]))
        with torch.no_grad():  # what the unmerged model says, which merging can learn to go on saying
            plain = ViTForImageClassification.from_pretrained(options["model"])
            labels = plain(collate([processed[i] for i in range(len(images))])["pixel_values"]).logits.argmax(-1)
        for i, label in enumerate(labels.tolist()):
            images[i]["image"].save(data / f"{i}.png")
            with open(data / "labels.csv", "a") as file:
                file.write(("file,label\n" if i == 0 else "") + f"{i}.png,{label}\n")
        options["data"] = str(data)
    summary = train(TrainArguments(**{**options, "steps": 60, "task": task, "init": "random", "lr": 0.02}))
    losses = logged(options["output_dir"], "loss")
    assert len(losses) == 60 and summary["steps"] == 60
    assert sum(losses[-20:]) < sum(losses[:20])


def test_best_adapter_is_the_one_kept(options):
    summary = train(TrainArguments(**{**options, "steps": 9, "lr": 0.5}))
    lines = logged(options["output_dir"])
    by_step = {line["step"]: line["validation"]["kl"] for line in lines if "validation" in line}
    assert sorted(by_step) == [0, 3, 6, 9]
    assert summary["best_step"] == min(by_step, key=by_step.get)
    assert summary["best_validation"]["kl"] == min(by_step.values())
    adapter = MergeAdapter.from_pretrained(Path(options["output_dir"], "adapter"))
    assert adapter.config.r == 2 and adapter.backbone.num_layers == 4


def test_learning_rate_is_half_a_cosine(options):
    train(TrainArguments(**options))
    rates = logged(options["output_dir"], "lr")
    cosine = 0.5 * (1 + torch.cos(torch.pi * torch.arange(1, 7) / 6))
    assert rates == pytest.approx((1e-6 + (0.01 - 1e-6) * cosine).tolist(), rel=1e-5)


def test_accumulated_batches_learn_what_one_large_batch_learns(options, tmp_path):
    train(TrainArguments(**options))
    split = {**options, "output_dir": str(tmp_path / "split"), "batch_size": 2, "gradient_accumulation_steps": 2}
    train(TrainArguments(**split))
    (_, whole), (_, parts) = learned(options["output_dir"]), learned(split["output_dir"])
    for key in whole:
        torch.testing.assert_close(parts[key], whole[key], rtol=1e-3, atol=1e-4)


def test_checkpoints_hold_the_embedding_only_and_are_thinned_out(options):
    train(TrainArguments(**options))
    folder = Path(options["output_dir"], "checkpoints")
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000004", "step-00000006"]
    assert all("merge_embedding" in key for key in learned(options["output_dir"])[1])


def test_killed_run_resumes_to_the_same_bits(options, tmp_path):
    """SIGKILL at a random moment, twice, against a run that was left alone."""
    options["steps"], options["augmentation"] = 24, "flip"

    def command(output_dir):
        listed = {**options, "output_dir": str(output_dir)}
        flags = [part for name, value in listed.items() for part in (f"--{name}", str(value))]
        return [str(ROOT / "recipes" / "train.py"), *flags]

    env = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_python(command(whole), env=env, check=True)
    for killed in range(2):
        process = Child(command(cut), tmp_path / f"log-{killed}", env=env)
        before = len(list(cut.glob("checkpoints/step-*")))
        deadline = time.monotonic() + 120
        while process.is_alive() and time.monotonic() < deadline:
            steps = sorted(cut.glob("checkpoints/step-*"))
            if len(steps) > before or (steps and before):
                time.sleep(random.uniform(0, 0.3))
                break
            time.sleep(0.01)
        process.kill()
        process.wait()
        assert list(cut.glob("checkpoints/step-*")), "killed before the first checkpoint"
    finished = run_python(command(cut), env=env, check=True)
    assert "resuming from" in finished.stdout
    (name, expected), (resumed_name, resumed) = learned(whole), learned(cut)
    assert name == resumed_name == "step-00000024"
    assert all(torch.equal(resumed[key], expected[key]) for key in expected)
    best = [load_file(folder / "adapter" / "merge_adapter.safetensors") for folder in (whole, cut)]
    assert all(torch.equal(best[0][key], best[1][key]) for key in best[0])
    logs = [logged(f) for f in (whole, cut)]
    assert logs[0] == logs[1]


def test_run_with_other_options_is_not_mixed_in(options):
    train(TrainArguments(**options))
    with pytest.raises(BadValue, match=r"lr=0\.5.*started with 0\.01.*--resume never"):
        train(TrainArguments(**{**options, "lr": 0.5}))
    assert train(TrainArguments(**{**options, "lr": 0.5, "resume": "never"}))["steps"] == 6


def test_loss_that_is_not_finite_stops_the_run(options):
    with pytest.raises(FloatingPointError, match=r"step \d+, images \[.*last good checkpoint"):
        train(TrainArguments(**{**options, "lr": 1e30, "steps": 40, "validate_every": 40}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"r": "-1"}, "r=-1"),
        ({"r": "[1, 2]"}, "r=.*2 layers and the model has 4"),
        ({"r": "many"}, "r='many'"),
        ({"task": "guessing"}, "task='guessing'.*classification, contrastive, distillation"),
        ({"augmentation": "blur"}, "augmentation='blur'"),
        ({"validation_size": 48}, "validation_size=48.*fewer than the 48"),
        ({"embed_dim": 5}, "embed_dim=5.*multiple of 16"),
        ({"data": "./nowhere"}, "nowhere"),
    ],
)
def test_bad_options_are_named(options, change, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(TrainArguments(**{**options, **change}))


def test_classification_needs_labels(options):
    with pytest.raises(BadValue, match=r"image \d+ has no label"):
        train(TrainArguments(**{**options, "task": "classification", "steps": 20}))
