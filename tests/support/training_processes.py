"""The training program in processes of its own: forked, so that they start at once."""

import json
import multiprocessing
import os
import socket
import sys
import threading
import time
from pathlib import Path

from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tqdm import tqdm

from dtem_hf.training.arguments import TrainArguments
from dtem_hf.training.program import train


def start_training(options, num_processes, log):
    """Start the training program in so many processes; each has its `log`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(num_processes):
        process = multiprocessing.get_context("fork").Process(
            target=_train, args=(options, rank, num_processes, port, Path(f"{log}-{rank}"))
        )
        process.log = Path(f"{log}-{rank}")
        process.start()
        started.append(process)
    return started


def _train(options, rank, num_processes, port, log):
    os.environ["ACCELERATE_USE_CPU"] = "true"
    if num_processes > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank))
        os.environ.update(WORLD_SIZE=str(num_processes), LOCAL_WORLD_SIZE=str(num_processes))
    # tqdm's lock is shared with the parent: killed while it holds it, this process would stop every later bar there.
    tqdm.set_lock(threading.RLock())
    # What earlier tests of this process did with accelerate must not be known here.
    AcceleratorState._reset_state(True)
    with open(log, "w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file
        train(TrainArguments(**options))


def wait_for(processes):
    """What processes that must end by themselves, with status 0, have printed."""
    for process in processes:
        process.join(timeout=240)
    printed = [process.log.read_text() for process in processes]
    assert [process.exitcode for process in processes] == [0] * len(processes), printed
    return printed


def wait_for_step(output_dir, step, processes):
    """Return as soon as a run that goes on has taken a step."""
    metrics = Path(output_dir, "metrics.jsonl")
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and all(process.is_alive() for process in processes):
        written = metrics.read_text() if metrics.is_file() else ""
        lines = written[: written.rfind("\n") + 1].splitlines()  # the last one may be in the making
        if lines and json.loads(lines[-1])["step"] >= step:
            return
        time.sleep(0.002)
    raise AssertionError([process.log.read_text() for process in processes])


def logged(output_dir, name=None):
    """The lines of a run's `metrics.jsonl`; of one figure, its values."""
    lines = [json.loads(line) for line in Path(output_dir, "metrics.jsonl").read_text().splitlines()]
    return lines if name is None else [line[name] for line in lines if name in line]


def outcome(output_dir):
    """What must be the same, bit for bit, however a run came to its end: learned weights, the best ones, metrics."""
    newest = sorted(Path(output_dir, "checkpoints").glob("step-*"))[-1]
    return {
        "last": newest.name,
        "weights": {key: value.tolist() for key, value in load_file(newest / "model.safetensors").items()},
        "best": Path(output_dir, "adapter", "merge_adapter.safetensors").read_bytes(),
        "metrics": Path(output_dir, "metrics.jsonl").read_text(),
    }
