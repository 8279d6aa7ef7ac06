"""The program for an accelerator runs from end to end on a CPU, in small."""

import json

import pytest
import torch

from dtem_hf import BadValue
from recipes.benchmark_device import DeviceArguments, compare_kernels, main


def test_it_runs_in_small(tmp_path):
    main(["--tiny", "True", "--device", "cpu", "--dtype", "float32", "--output_dir", str(tmp_path)])
    summary = json.loads((tmp_path / "device.json").read_text())
    order = [(row["runtime"], row["batch_size"]) for row in summary["rows"]]
    assert order == [("eager", 2), ("default", 2)]
    for row in summary["rows"]:
        assert row["of_ideal"] == pytest.approx(row["speedup"] / row["ideal_speedup"])
        assert row["merging"]["share"] > 0 if row["runtime"] == "default" else row["merging"]["shares"]["rest"] < 1
        assert row["attention"] == "sdpa" and row["measured_in_seconds"] > 0
    assert summary["kernels"] == [None] and summary["left_out"] == []
    for row in summary["attention"]:
        assert row["seconds"][row["faster"]] == min(row["seconds"]["mask"], row["seconds"]["extended_keys"])
        assert set(row["kernels"].values()) == {"FLASH_ATTENTION"}  # with sizes, too, a fused kernel runs
    assert (tmp_path / "tiny-default-sdpa-2" / "benchmark.md").is_file()
    compiled = json.loads((tmp_path / "tiny-default-sdpa-2" / "benchmark.json").read_text())["rows"]
    assert compiled[0]["batches"][0]["merging"] is None and compiled[1]["batches"][0]["merging"]["seconds"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there, the kernels run")
def test_there_is_nothing_to_compare_where_no_kernel_runs():
    assert compare_kernels(torch.device("cpu"), 8) is None


def test_what_would_start_too_late_is_named(tmp_path):
    main(
        [*["--tiny", "True", "--device", "cpu", "--dtype", "float32", "--minutes", "0", "--output_dir"], str(tmp_path)]
    )
    summary = json.loads((tmp_path / "device.json").read_text())
    assert summary["left_out"] == ["tiny-eager-sdpa-2", "tiny-default-sdpa-2"]
    assert summary["rows"] == [] and len(summary["attention"]) == 1  # what was measured before is kept


def test_bad_options_are_named():
    with pytest.raises(BadValue, match="models"):
        DeviceArguments(models=["vit-huge"], device="cpu")
    if not torch.cuda.is_available():
        with pytest.raises(BadValue, match="device='cuda': auto, or one of this machine: cpu"):
            main([])
