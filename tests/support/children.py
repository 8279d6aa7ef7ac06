"""Python programs in processes of their own, which begin with torch and transformers imported.

To import them takes longer than most tests. A server does so once for each worker of pytest, and every process is
forked from it. The server knows nothing of this package or of earlier tests: a program imports the package anew.
Libraries read some variables (HF_HOME, HF_ENDPOINT, OMP_NUM_THREADS) when they are imported: a test of those starts
Python itself.
"""

from __future__ import annotations

import os
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch


_FORKS = get_context("forkserver")
# What almost every program of this package imports, and none of its own modules.
_FORKS.set_forkserver_preload(
    [
        *("accelerate", "datasets", "evaluate", "scipy.optimize", "torch._dynamo", "torch.distributed.tensor"),
        *("transformers.modeling_utils", "transformers.models.auto.modeling_auto", "transformers.trainer_utils"),
    ]
)


class Child:
    """A program that runs: arguments as behind `python`, a script, `-m` and a module, or `-c` and code.

    Its output and errors go into the file `log`, or errors into a file of their own where they are asked for.
    """

    def __init__(
        self,
        arguments: Sequence[object],
        log: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        errors: Path | None = None,
    ) -> None:
        self.log = log
        values = (list(map(str, arguments)), dict(os.environ if env is None else env), cwd or Path.cwd())
        self._process = _FORKS.Process(target=_run, args=(*values, log, errors or log))
        self._process.start()
        self.pid: int = self._process.pid
        self.kill, self.is_alive = self._process.kill, self._process.is_alive

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float = 240) -> int:
        """Its exit code, which is that of `subprocess`."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.kill()
            raise TimeoutError(self.log.read_text())
        return self._process.exitcode


def run_python(
    arguments: Sequence[object], env: Mapping[str, str] | None = None, check: bool = False, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end. What it prints is returned; with `check`, an exit code other than 0 is an error."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        code = Child(arguments, out, env, errors=err, **options).wait()
        done = subprocess.CompletedProcess(list(arguments), code, out.read_text(), err.read_text())
    assert not check or code == 0, done.stderr[-3000:]
    return done


def start_together(arguments: Sequence[object], count: int, folder: Path, env: Mapping[str, str]) -> list[Child]:
    """Start a program in so many processes that find each other as torchrun's do; `folder` gets their logs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    return [
        Child(arguments, folder / f"log-{rank}", {**env, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]


def _run(arguments: list[str], env: dict[str, str], cwd: Path, out: Path, err: Path) -> None:
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    torch.set_num_threads(1)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in (1, 2))
    _start(*arguments)


def _start(first: str, *rest: str) -> None:
    """As Python itself starts a program."""
    added = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if first == "-c":
        sys.path[:0], sys.argv = ["", *added], ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        sys.path[:0], sys.argv = ["", *added], list(rest)
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[:0], sys.argv = [str(Path(first).parent), *added], [first, *rest]
        runpy.run_path(first, run_name="__main__")
