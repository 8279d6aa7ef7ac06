"""A run that goes wrong says where, and what is still good; threads and precision are as they were asked for."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dtem_hf.training.arguments import TrainArguments
from dtem_hf.training.run import Run
from tests.support.children import run_python


ROOT = Path(__file__).parents[2]


def test_weight_that_is_not_a_number_stops_the_run_at_its_step_with_its_images(options):
    """The last checkpoint is one from before: it goes on to be used."""
    run = Run(TrainArguments(**options))

    def poison(module, inputs):
        if run.step == 4:
            run.model.merge_parameters().__next__().data.fill_(torch.nan)

    run.model.register_forward_pre_hook(poison)
    names = r"images \[(\S+\d+\.png(, )?){4}\]"
    with pytest.raises(FloatingPointError, match=rf"loss is nan at step 5, {names}; .*checkpoint: step-00000004"):
        run.train()
    saved = Path(options["output_dir"], "checkpoints")
    assert sorted(path.name for path in saved.iterdir()) == ["step-00000002", "step-00000004"]
    assert Run(TrainArguments(**options)).train()["steps"] == 6


def test_gradient_that_is_not_a_number_stops_the_run_although_the_loss_is_one(options):
    run = Run(TrainArguments(**options))
    next(run.model.merge_parameters()).register_hook(lambda gradient: gradient * (torch.nan if run.step == 3 else 1.0))
    with pytest.raises(FloatingPointError, match=r"the gradient is not finite at step 4, .*checkpoint: step-00000002"):
        run.train()


def test_a_real_launch_with_a_yaml_file_has_all_threads_and_bfloat16(options, tmp_path):
    """`accelerate launch` gives a process one thread; here it gets all cores, as no option asks for fewer."""
    options.update(mixed_precision="bf16", num_workers=1)
    (tmp_path / "run.yaml").write_text("\n".join(f"{name}: {value}" for name, value in options.items()))
    environment = {name: value for name, value in os.environ.items() if not name.endswith("NUM_THREADS")}
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", ROOT / "recipes" / "train.py"]
    # The launcher starts Python itself. One value is overridden on the command line.
    done = run_python(
        [*launch, "--config", tmp_path / "run.yaml", "--steps", "4"],
        env={**environment, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    used = int(re.search(r"1 × .+, (\d+) threads, precision bf16", done.stdout)[1])
    plain = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.get_num_threads())"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert used == int(plain.stdout)
    summary = json.loads(Path(options["output_dir"], "adapter", "training.json").read_text())
    assert summary["mixed_precision"] == "bf16" and summary["steps"] == 4 and summary["arguments"]["lr"] == 0.01
