"""The benchmark program: rows, batch sizes and what it refuses. No figure of speed is tested."""

import json

import pytest
from transformers import ViTConfig

from dtem_hf import BadValue
from dtem_hf.evaluation.benchmark import BenchmarkArguments, benchmark, main


def test_every_row_at_every_batch_size(vit_folder, tmp_path, capsys):
    options = ["--r", "1", "4", "--flops", "0.7", "--methods", "tome", "--batch_sizes", "1", "3", "--rounds", "2"]
    main(["--model", str(vit_folder), *options, "--output_dir", str(tmp_path)])
    result = json.loads((tmp_path / "benchmark.json").read_text())
    rows = result["rows"]
    assert [row["method"] for row in rows] == ["none", "tome", "tome", "tome"]
    assert all([batch["batch_size"] for batch in row["batches"]] == [1, 3] for row in rows)
    assert rows[3]["ratio"] <= 0.7 and rows[1]["multiply_adds"] > rows[2]["multiply_adds"]
    for row in rows:
        assert row["ideal_speedup"] == pytest.approx(1 / row["ratio"])
        assert all(batch["peak_memory"] > 0 for batch in row["batches"])
    assert result["image_size"] == [32, 32]
    assert "tome" in capsys.readouterr().out


def test_a_config_is_enough_with_random_weights(tmp_path):
    ViTConfig(image_size=16, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2).save_pretrained(
        tmp_path
    )
    options = {"r": ["2"], "batch_sizes": [1], "rounds": 1, "warmup": 0, "image_size": 24}
    result = benchmark(BenchmarkArguments(model=str(tmp_path), random_weights=True, **options))
    assert result["image_size"] == [24, 24] and len(result["rows"]) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [({"batch_sizes": []}, "batch_sizes"), ({"batch_sizes": [4, 0]}, "batch_sizes"), ({"dtype": "int8"}, "dtype")],
)
def test_bad_options_are_named(change, message):
    with pytest.raises(BadValue, match=message):
        BenchmarkArguments(model="m", **change)
