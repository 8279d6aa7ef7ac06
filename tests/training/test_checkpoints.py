"""Checkpoints are whole or not there, and a full disk leaves the one before intact."""

import os
import subprocess

import pytest
import torch
from accelerate import Accelerator

from dtem_hf.training import checkpoints


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def learner():
    """A prepared model with a frozen part and an optimiser that has taken a step."""
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    model[0].requires_grad_(False)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model[1].parameters(), lr=0.1))
    model(torch.ones(2, 64)).sum().backward()
    optimizer.step()
    hook = accelerator.register_save_state_pre_hook(checkpoints.keep_only_learned)
    yield accelerator, model
    hook.remove()
    accelerator.free_memory()


def test_full_disk_leaves_the_checkpoint_before_intact(small_disk, learner):
    accelerator, model = learner
    checkpoints.save(accelerator, small_disk, 1, {"step": 1}, keep=2)
    before = {path.name: path.read_bytes() for path in (small_disk / "step-00000001").iterdir()}
    learned = model[1].weight.detach().clone()
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    (small_disk / "filler").write_bytes(b"x" * (free - 20_000))
    with pytest.raises(OSError, match=r"step 2 could not be written .*last good checkpoint: step-00000001.*Free some"):
        checkpoints.save(accelerator, small_disk, 2, {"step": 2}, keep=2)
    assert sorted(path.name for path in small_disk.iterdir()) == ["filler", "step-00000001"]
    assert {path.name: path.read_bytes() for path in (small_disk / "step-00000001").iterdir()} == before
    with torch.no_grad():
        model[1].weight.zero_()
    assert checkpoints.load(accelerator, small_disk / "step-00000001") == {"step": 1}
    assert torch.equal(model[1].weight, learned)
    (small_disk / "filler").unlink()
    checkpoints.save(accelerator, small_disk, 2, {"step": 2}, keep=1)
    assert [path.name for path in small_disk.iterdir()] == ["step-00000002"]


def test_what_a_killed_run_left_half_written_is_no_checkpoint_and_goes(tmp_path, learner):
    accelerator, _ = learner
    (tmp_path / ".partial-00000003").mkdir()
    (tmp_path / "step-00000002").mkdir()  # without its last file
    assert checkpoints.complete(tmp_path) == []
    assert checkpoints.last_good(tmp_path).endswith("none")
    saved = checkpoints.save(accelerator, tmp_path, 4, {"step": 4}, keep=1)
    assert checkpoints.complete(tmp_path) == [saved]
    assert not (tmp_path / ".partial-00000003").exists()
