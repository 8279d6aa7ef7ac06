"""One run at a time in an output folder, and processes that do not know each other are refused."""

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from dtem_hf import BadValue
from dtem_hf.programs import lock
from dtem_hf.programs.lock import LOCK_NAME, only_run_in
from tests.support.children import run_python, start_together


ROOT = Path(__file__).parents[2]
IN_USE = r"output_dir='.*run': a folder that no other run is using; process \d+ on \S+ is using it"


def _hold(folder, entered, child):
    with only_run_in(folder):
        if child:  # as a worker that loads data, which may outlive its parent
            multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,)).start()
        entered.set()
        time.sleep(600)


@pytest.fixture(params=["flock", "without flock"])
def system(request, monkeypatch):
    """With the system's locks, and on one that has none."""
    if request.param == "without flock":
        monkeypatch.setattr(lock, "fcntl", None)


@pytest.mark.parametrize("child", [False, True], ids=["alone", "with a child"])
def test_a_folder_is_refused_while_another_process_holds_it_and_free_after_kill_9(system, tmp_path, child):
    context = multiprocessing.get_context("fork")
    entered = context.Event()
    process = context.Process(target=_hold, args=(tmp_path / "run", entered, child))
    process.start()
    assert entered.wait(60)
    with pytest.raises(BadValue, match=IN_USE), only_run_in(tmp_path / "run"):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert (tmp_path / "run" / LOCK_NAME).is_file()
    with only_run_in(tmp_path / "run"):
        pass


def test_a_thread_of_the_same_process_is_refused(system, tmp_path):
    seen = []

    def enter():
        try:
            with only_run_in(tmp_path / "run"):
                seen.append("entered")
        except BadValue as error:
            seen.append(str(error))

    with only_run_in(tmp_path / "run"):
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        with only_run_in(tmp_path / "other"):
            pass
    assert len(seen) == 1 and str(os.getpid()) in seen[0]
    enter()
    assert seen[1:] == ["entered"]


def test_many_at_once_enter_one_by_one(tmp_path):
    """The file is removed and made again all the time, and no two runs are ever inside."""
    inside, most, entered = [0], [0], [0]

    def enter():
        for _ in range(40):
            try:
                with only_run_in(tmp_path / "run"):
                    inside[0] += 1
                    most[0], entered[0] = max(most[0], inside[0]), entered[0] + 1
                    time.sleep(0.001)
                    inside[0] -= 1
            except BadValue:
                time.sleep(0.0005)

    threads = [threading.Thread(target=enter) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 1 and entered[0] > 8


def test_nothing_stays_where_nothing_was_written(tmp_path):
    with only_run_in(tmp_path / "run"):
        assert (tmp_path / "run" / LOCK_NAME).is_file()
    assert not (tmp_path / "run").exists()
    (tmp_path / "kept").mkdir()
    with only_run_in(tmp_path / "kept"):
        pass
    assert list((tmp_path / "kept").iterdir()) == []


def flags(options):
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def test_two_trainings_in_one_folder_are_refused_at_once(options, start_processes, tmp_path):
    """The second one ends before it has loaded a model, with one line."""
    (first,) = start_processes({**options, "output_dir": str(tmp_path / "run"), "steps": 100_000})
    while not (tmp_path / "run" / LOCK_NAME).is_file():
        assert first.is_alive(), first.log.read_text()
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGSTOP)  # it goes on using the folder, and no processor
    (tmp_path / "empty").mkdir()
    second = {**options, "model": str(tmp_path / "empty"), "output_dir": str(tmp_path / "run"), "seed": 1}
    done = run_python([ROOT / "recipes" / "train.py", *flags(second)])
    printed = done.stderr.splitlines()
    assert done.returncode == 2 and printed[-1].startswith("Error: output_dir="), printed
    assert f"process {first.pid} on " in printed[-1]
    assert first.is_alive()


def test_processes_that_do_not_know_each_other_are_refused(options, tmp_path):
    """As torchrun starts them on a machine without an accelerator, where nothing says that CPUs are to be used."""
    environment = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    processes = start_together([ROOT / "recipes" / "train.py", *flags(options)], 2, tmp_path, environment)
    assert 0 not in [process.wait() for process in processes]
    printed = processes[0].log.read_text()
    assert "2 processes were launched and Accelerate sees 1: without an accelerator, set ACCELERATE_USE_CPU" in printed
    assert not (tmp_path / "run" / "checkpoints").exists()
