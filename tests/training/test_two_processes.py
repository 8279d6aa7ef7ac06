"""Two processes learn what one learns, and a run that is killed in the midst of it ends in the same bits."""

import json
import random
import shutil
import time
from pathlib import Path

import pytest

from dtem_hf import BadValue
from dtem_hf.training.arguments import TrainArguments
from dtem_hf.training.program import train
from tests.support.training_processes import logged, outcome, wait_for_step


@pytest.mark.parametrize("r", ["2", "[2, 0, 3, 0]"])  # where a layer merges nothing, its embedding gets no gradient
def test_two_processes_of_16_learn_what_one_of_32_learns(options, finish_processes, tmp_path, r):
    options.update(r=r, steps=20, validate_every=10, checkpoint_every=20, augmentation="flip", glance_every=10)
    one = {**options, "output_dir": str(tmp_path / "one"), "batch_size": 32}
    two = {**options, "output_dir": str(tmp_path / "two"), "batch_size": 16}
    finish_processes(one)
    finish_processes(two, num_processes=2)
    hardware = json.loads((tmp_path / "two" / "adapter" / "training.json").read_text())["hardware"]
    assert hardware.startswith("2 × ")
    losses = [logged(folder, "loss") for folder in (one["output_dir"], two["output_dir"])]
    assert len(losses[1]) == 20 and max(losses[0]) - min(losses[0]) > 1e-4
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    kl = [[figures["kl"] for figures in logged(f, "validation")] for f in (one["output_dir"], two["output_dir"])]
    assert kl[1] == pytest.approx(kl[0], abs=1e-5)


def test_killed_run_of_two_processes_resumes_to_the_same_bits(options, start_processes, finish_processes, tmp_path):
    options.update(steps=24, checkpoint_every=3, augmentation="flip")
    whole, cut = ({**options, "output_dir": str(tmp_path / name)} for name in ("whole", "cut"))
    finish_processes(whole, num_processes=2)
    processes = start_processes(cut, num_processes=2)
    wait_for_step(cut["output_dir"], 4, processes)
    time.sleep(random.uniform(0, 0.2))
    for process in processes:
        process.kill()
        process.join()
    printed = finish_processes(cut, num_processes=2)
    assert "resuming from" in printed[0] and "2 × " in printed[0]
    assert outcome(cut["output_dir"]) == outcome(whole["output_dir"])


def test_half_the_processes_with_twice_the_batches_go_on_with_a_run(options, finish_processes):
    """What is part of a run is how many images a step sees, not how they are shared out."""
    options.update(steps=6, checkpoint_every=3, batch_size=4)
    finish_processes({**options, "keep_checkpoints": 9}, num_processes=2)
    shutil.rmtree(Path(options["output_dir"], "checkpoints", "step-00000006"))
    before = logged(options["output_dir"], "loss")
    printed = finish_processes({**options, "gradient_accumulation_steps": 2})
    assert "resuming from" in printed[0] and "steps of 8 images: 1 × " in printed[0]
    assert logged(options["output_dir"], "loss") == pytest.approx(before, abs=1e-5)
    with pytest.raises(BadValue, match=r"batch_size=4: .* processes is 4, and this run was started with 8"):
        train(TrainArguments(**options))
