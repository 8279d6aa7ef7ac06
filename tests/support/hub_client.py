"""What the tests of the Hub run in a process of its own, whose environment names the loopback Hub before
huggingface_hub is imported."""

from __future__ import annotations

import io
import os
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.full_disk import full_disk


Client = Callable[..., Any]


def hub_environment(endpoint: str, home: Path, token: str | None = None) -> dict[str, str]:
    """The environment of a client of the loopback Hub, without whatever tokens and caches this machine has."""
    home.mkdir(parents=True, exist_ok=True)
    (home / ".check_for_update_done").touch()  # or the hf command asks PyPI for a newer version
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    path = os.pathsep.join([str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")])
    return {
        **kept,
        **{"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_ETAG_TIMEOUT": "2"},
        **{"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost", "PYTHONPATH": path},
        **({} if token is None else {"HF_TOKEN": token}),
    }


@contextmanager
def client_process(environment: dict[str, str]) -> Iterator[Client]:
    """Yield a function that calls `module:name` with arguments in another process, and returns or raises what it does.

    The process is started with the environment and lives as long as the block.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in set(os.environ) - set(environment):
            patch.delenv(name)
        for name, value in environment.items():
            patch.setenv(name, value)
        pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        pool.submit(hurry).result()
    try:
        yield lambda target, *args, **kwargs: pool.submit(call, target, args, kwargs).result(timeout=300)
    finally:
        pool.shutdown()


def hurry() -> None:
    """In this process, huggingface_hub waits a fiftieth of its time before it asks a Hub again."""
    from huggingface_hub.utils import _http

    _http.time = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: time.sleep(seconds / 50)})


def call(target: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call `module:name.of.attribute`."""
    module, name = target.split(":")
    found: Any = import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    result = found(*args, **kwargs)
    # huggingface_hub's own cannot be pickled before 2.0.
    return SimpleNamespace(**vars(result)) if type(result).__name__ == "CommitInfo" else result


def warned(target: str, *args: Any, **kwargs: Any) -> list[str]:
    """The warnings that a call gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(target, args, kwargs)
    return [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]


def logits(model_name: str, pixels: Any, registered: bool = False, **kwargs: Any) -> Any:
    """The logits of a classifier, by this package's Auto class or by transformers' own."""
    import torch
    import transformers

    import dtem_hf

    torch.set_num_threads(1)  # as in the tests: with more of them, sums may be split elsewhere
    if registered:
        dtem_hf.register()
    auto = (transformers if registered else dtem_hf).AutoModelForImageClassification
    try:
        model = auto.from_pretrained(model_name, **kwargs)
        with torch.inference_mode():
            return model(pixels).logits
    finally:
        dtem_hf.unregister()


def push_merged(base: str, adapter_repo: str, **kwargs: Any) -> str:
    """Load a backbone from the Hub, merge it, push the adapter. Returns the revision of the backbone it records."""
    import dtem_hf

    model = dtem_hf.AutoModelForImageClassification.from_pretrained(base, merge=dtem_hf.DTEMConfig(r=2))
    model.push_merge_adapter(adapter_repo, **kwargs)
    return model.to_merge_adapter().backbone.base_revision or ""


def run_command(*arguments: str, token: str | None = None) -> tuple[int, str, str]:
    """Run `dtem-hf` in this process: exit code, stdout, stderr."""
    from typer.testing import CliRunner

    from dtem_hf.cli import app

    result = CliRunner().invoke(app, arguments, env={"HF_TOKEN": token, "COLUMNS": "200"})
    return result.exit_code, result.stdout, result.stderr


def train(options: dict[str, Any], token: str | None = "hf_me") -> str:
    """Run the training program, and return what it prints."""
    from dtem_hf.training.arguments import TrainArguments
    from dtem_hf.training.program import train as run

    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        if token is not None:
            patch.setenv("HF_TOKEN", token)
        run(TrainArguments(**options))
    return printed.getvalue()


def validate_card(path: str) -> None:
    """huggingface_hub's own validation of a card, by the Hub's route."""
    from huggingface_hub import ModelCard

    ModelCard.load(path).validate()


def with_small_files(target: str, *args: Any, **kwargs: Any) -> Any:
    """Call a function in this process, which may write no file of more than 2 kB meanwhile."""
    with full_disk(2048):
        return call(target, args, kwargs)


def start(target: str, *args: Any, **kwargs: Any) -> int:
    """Call a function in a fork of this process, which prints nothing. Returns its number."""
    process = os.fork()
    if not process:
        code = 1
        try:
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
            call(target, args, kwargs)
            code = 0
        finally:
            os._exit(code)
    return process


def run_program(path: str, *arguments: str, token: str) -> str:
    """Run a program in this process with a token, and return what it prints."""
    import runpy
    import sys

    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setenv("HF_TOKEN", token)
        patch.setattr(sys, "argv", [path, *arguments])
        runpy.run_path(path, run_name="__main__")
    return printed.getvalue()
