"""SIGTERM and SIGINT end a run behind a step, with a checkpoint, and nothing is lost."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dtem_hf.training.interruption import Interruption, leave_signals_to_the_parent
from tests.support.training_processes import outcome, wait_for, wait_for_step


ROOT = Path(__file__).parents[2]


@pytest.fixture
def two_folders(options, tmp_path):
    """The same run twice: one that is left alone, one that is interrupted."""
    options.update(steps=40, checkpoint_every=100, validate_every=9)
    return [{**options, "output_dir": str(tmp_path / name)} for name in ("whole", "cut")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_a_run_with_a_checkpoint_and_nothing_is_lost(
    two_folders, start_processes, finish_processes, number
):
    whole, cut = two_folders
    finish_processes(whole)
    (process,) = start_processes(cut)
    wait_for_step(cut["output_dir"], 3, [process])
    os.kill(process.pid, number)
    (printed,) = wait_for([process])
    step = int(re.search(rf"stopped by {number.name} after step (\d+) of 40; .*The same command", printed)[1])
    assert 3 <= step < 40
    assert [path.name for path in Path(cut["output_dir"], "checkpoints").iterdir()] == [f"step-{step:08d}"]
    assert "resuming from" in finish_processes(cut)[0]
    assert outcome(cut["output_dir"]) == outcome(whole["output_dir"])


def test_signal_to_one_of_two_processes_ends_both(two_folders, start_processes, finish_processes):
    whole, cut = two_folders
    finish_processes(whole, num_processes=2)
    processes = start_processes(cut, num_processes=2)
    wait_for_step(cut["output_dir"], 3, processes)
    os.kill(processes[1].pid, signal.SIGTERM)
    printed = wait_for(processes)
    assert "stopped by SIGTERM after step" in printed[0]
    finish_processes(cut, num_processes=2)
    assert outcome(cut["output_dir"]) == outcome(whole["output_dir"])


def test_signal_in_front_of_the_first_step_ends_a_run_that_has_learned_nothing(options, start_processes):
    (process,) = start_processes({**options, "validation_size": 40, "batch_size": 1})
    while not process.log.is_file() or "parameters learn" not in process.log.read_text():
        assert process.is_alive()
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGTERM)
    (printed,) = wait_for([process])
    assert "nothing was learned yet" in printed or "after step" in printed


def test_second_interrupt_ends_at_once_and_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT)
    with Interruption() as interruption:
        assert interruption.reason is None
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # as a launcher hands on what the terminal sent already
        assert interruption.reason == "SIGINT"
        interruption._since -= 60
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is before


def _wait_as_a_worker(ready):
    leave_signals_to_the_parent(0)
    ready.set()
    time.sleep(600)


def test_worker_is_ended_by_its_parent_alone():
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    worker = context.Process(target=_wait_as_a_worker, args=(ready,))
    worker.start()
    assert ready.wait(60)
    for name in ("TERM", "INT"):  # as a job scheduler, or a terminal
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    worker.join(timeout=0.5)
    assert worker.is_alive()
    worker.terminate()
    worker.join(timeout=60)
    assert worker.exitcode == 0


@pytest.mark.parametrize("name", ["accelerate", "torchrun"])
def test_signal_that_reaches_the_launcher_only(options, tmp_path, name):
    """`accelerate launch` dies of it, torchrun hands it on: either way the processes end with a checkpoint."""
    options.update(steps=100_000, checkpoint_every=100_000, validate_every=100_000)
    flags = [part for option, value in options.items() for part in (f"--{option}", str(value))]
    launchers = {
        "accelerate": ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"],
        "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "--"],
    }
    log = tmp_path / "log"
    with open(log, "w") as file:
        launcher = subprocess.Popen(
            [sys.executable, *launchers[name], str(ROOT / "recipes" / "train.py"), *flags],
            env={**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "PYTHONUNBUFFERED": "1"},
            stdout=file,
            stderr=file,
        )
    launcher.log, launcher.is_alive = log, lambda: launcher.poll() is None
    try:
        wait_for_step(options["output_dir"], 2, [launcher])
        launcher.send_signal(signal.SIGTERM)
        launcher.wait(timeout=120)
        deadline = time.monotonic() + 120
        while "The same command resumes from there" not in log.read_text():
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
    finally:
        launcher.kill()
    (checkpoint,) = Path(options["output_dir"], "checkpoints").iterdir()
    assert re.fullmatch(r"step-\d{8}", checkpoint.name)
    processes = {"accelerate": "1 × ", "torchrun": "2 × "}[name]
    assert processes in log.read_text()
