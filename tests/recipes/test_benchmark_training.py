"""The benchmark of training steps: what it compares with is what it says, and its JSON says what it measured."""

import json
from pathlib import Path

import pytest
import torch

from dtem_hf.ops import soft_grouping
from recipes.benchmark_training import grouping_by_definition, main


def test_the_definition_and_the_fast_rounds_are_the_same_function():
    torch.manual_seed(0)
    scores = torch.rand(2, 9, 8, requires_grad=True)
    readout = torch.randn(2, 9, 8)
    fast, slow = soft_grouping(scores, 4), grouping_by_definition(scores, 4)
    torch.testing.assert_close(slow, fast, rtol=1e-4, atol=1e-5)
    (of_fast,) = torch.autograd.grad((fast * readout).sum(), scores)
    (of_slow,) = torch.autograd.grad((slow * readout).sum(), scores)
    torch.testing.assert_close(of_slow, of_fast, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("autocast", ["no", "bfloat16"])
def test_every_row_is_measured(autocast, vit_folder, tmp_path, capsys):
    options = ["--model", str(vit_folder), "--r", "2", "--batch_size", "2", "--rounds", "2", "--device", "cpu"]
    main([*options, "--autocast", autocast, "--output_dir", str(tmp_path)])
    record = json.loads(Path(tmp_path, "training_step.json").read_text())
    rows = {row["step"]: row for row in record["rows"]}
    assert list(rows) == ["plain", "classification", "distillation", "straight_through", "fisher", "definition"]
    assert rows["plain"]["ratio_to_plain"]["median"] == 1 and rows["definition"]["ratio_to_definition"]["median"] == 1
    assert all(row["peak_bytes"] > 0 and row["seconds"]["median"] > 0 for row in record["rows"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in rows)


def test_bad_values(vit_folder):
    with pytest.raises(ValueError, match="rounds=0"):
        main(["--model", str(vit_folder), "--rounds", "0"])
