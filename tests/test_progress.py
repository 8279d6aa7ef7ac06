"""Progress bars are for those who look."""

import io
import sys
from pathlib import Path

import pytest
from transformers.utils import logging

from dtem_hf.progress import hide_other_bars, tqdm
from tests.support.children import run_python


ROOT = Path(__file__).resolve().parents[1]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream, drawn", [(Terminal(), True), (io.StringIO(), False)])
def test_a_bar_is_drawn_in_a_terminal_alone(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, drawn: bool) -> None:
    pytest.importorskip("ipykernel.kernelapp", reason="ipykernel is not installed")  # which alone is no notebook
    monkeypatch.setattr(sys, "stderr", stream)
    assert list(tqdm(range(3), desc="steps")) == [0, 1, 2]
    assert ("steps" in stream.getvalue()) is drawn
    assert not list(tqdm([], desc="others", disable=True)) and "others" not in stream.getvalue()
    logging.enable_progress_bar()
    hide_other_bars()
    assert logging.is_progress_bar_enabled() is drawn
    logging.enable_progress_bar()


def test_a_program_writes_no_bar_into_a_log(vit_folder: Path, tmp_path: Path) -> None:
    options = ["--model", vit_folder, "--methods", "tome", "--r", "4", "--batch_sizes", "1", "--rounds", "1"]
    script = ROOT / "recipes" / "benchmark.py"
    done = run_python([script, *options, "--device", "cpu", "--output_dir", tmp_path / "out"], check=True)
    assert (tmp_path / "out" / "benchmark.json").is_file()
    assert "\r" not in done.stderr and "%|" not in done.stderr and "Loading weights" not in done.stderr
