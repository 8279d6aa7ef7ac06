"""A step of 16 images learns the same however it is cut: 16 at once, 4 batches of 4, or 2 processes of 8."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.training_processes import logged


CUTS = {"16x1": (16, 1, 1), "4x4": (4, 4, 1), "2 processes of 8": (8, 1, 2), "2 processes of 4x2": (4, 2, 2)}
ROWS = [
    ("captioning", "git_folder", {}),
    ("captioning", "blip_folder", {"distillation_weight": 0.5}),
    ("caption_fisher", "git_folder", {}),
    ("fisher", "vit_folder", {}),
    ("feature_fisher", "clip_folder", {}),
    ("distillation", "vit_folder", {"feature_weight": 1.0}),
]


@pytest.mark.parametrize(("task", "folder", "changes"), ROWS, ids=lambda value: str(value) if value else "")
def test_a_step_is_the_same_however_it_is_cut(
    task, folder, changes, request, options, caption_options, finish_processes, tmp_path
):
    base = caption_options if folder in ("git_folder", "blip_folder") else options
    base = {**base, **changes, "task": task, "model": str(request.getfixturevalue(folder)), "r": "3", "steps": 3}
    losses, weights = {}, {}
    for name, (batch_size, accumulated, processes) in CUTS.items():
        run = {**base, "batch_size": batch_size, "gradient_accumulation_steps": accumulated, "lr": 1e-3}
        run.update(output_dir=str(tmp_path / name), checkpoint_every=3, init="random")
        finish_processes(run, processes)
        losses[name] = logged(run["output_dir"], "loss")
        weights[name] = load_file(Path(run["output_dir"], "checkpoints", "step-00000003", "model.safetensors"))
    whole = weights["16x1"]
    for name in CUTS:
        assert losses[name] == pytest.approx(losses["16x1"], rel=1e-5), losses
        for key, value in whole.items():
            torch.testing.assert_close(weights[name][key], value, rtol=1e-3, atol=2e-5)
