"""The device of a program is one that works here, or the refusal names those that do."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from dtem_hf import BadValue
from dtem_hf.programs.processes import choose_device
from tests.programs.test_output_folders import PROGRAMS


WITHOUT = ("dtem_hf.training.program", "dtem_hf.training.small_git")  # Accelerate chooses; it trains on the CPU
ABSENT = f"cuda:{torch.cuda.device_count()}"


@pytest.mark.parametrize("name", ["zz", "", "0", "cpu:-1", "meta", "hpu", "vulkan", ABSENT])
def test_a_device_that_does_not_work_here_is_named(name: str) -> None:
    with pytest.raises(BadValue, match=f"device='{name}': auto, or one of this machine: cpu"):
        choose_device(name)


def test_a_device_that_works_is_taken() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert torch.zeros(1, device=choose_device("auto")).sum() == 0


@pytest.mark.parametrize("program", sorted(PROGRAMS.keys() - WITHOUT))
def test_every_program_refuses_it_before_anything_is_loaded(program: str, tmp_path: Path) -> None:
    """Where the model is not there either, the device is named."""
    given = [*PROGRAMS[program], "--device", "zz", "--output_dir", str(tmp_path / "run")]
    with pytest.raises(BadValue, match="device='zz'"):
        import_module(program).main(given)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "program", sorted(PROGRAMS.keys() - {"recipes.benchmark_device", "dtem_hf.training.small_git"})
)
def test_every_program_names_a_model_that_is_not_there(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the words of this package: transformers speaks of a connection instead."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(import_module(program), "load_function", lambda *_: None, raising=False)
    with pytest.raises(FileNotFoundError, match="there is no folder nowhere here, and on the Hub nowhere"):
        import_module(program).main([*PROGRAMS[program], "--output_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
