"""What a run writes down: the same figures in metrics.jsonl and in the trackers' own files."""

import importlib.util
import json
import re
import shutil
import sqlite3
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dtem_hf import BadValue
from dtem_hf.training.arguments import TrainArguments
from dtem_hf.training.program import train
from dtem_hf.training.trackers import flat, new_run_id
from tests.support.training_processes import logged, outcome


def test_tensorboard_holds_what_metrics_jsonl_holds_and_images_per_second(options, finish_processes):
    options.update(report_to=["tensorboard"], glance_every=2)
    finish_processes(options)
    events = EventAccumulator(str(Path(options["output_dir"], "logs", "dtem-hf")))
    events.Reload()
    expected = {}
    for line in logged(options["output_dir"]):
        step = line.pop("step")
        for name, value in flat(line).items():
            expected.setdefault(name, []).append((step, pytest.approx(value, rel=1e-6)))
    written = {
        name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]
    }
    assert [step for step, _ in written["train/images_per_second"]] == [1, 2, 3, 4, 5, 6]
    assert all(rate > 0 for _, rate in written.pop("train/images_per_second"))
    assert written == expected
    named = {"train/loss", "train/lr", "validation/kl", "tokens/layer_03", "glance_soft/kl", "glance_hard/kl"}
    assert named < set(expected)


def test_last_line_that_was_being_written_is_forgotten(options, finish_processes, tmp_path):
    finish_processes(options)
    expected = outcome(options["output_dir"])
    metrics = Path(options["output_dir"], "metrics.jsonl")
    metrics.write_text(metrics.read_text() + '{"step": 6, "lo')
    assert "resuming from" in finish_processes(options)[0]
    assert outcome(options["output_dir"]) == expected


def test_tracker_that_is_not_here_is_named(options):
    with pytest.raises(BadValue, match=r"report_to='bulletin': none, or .* installed trackers: .*tensorboard"):
        train(TrainArguments(**{**options, "report_to": ["bulletin"]}))


def test_ids_of_runs_are_unique_and_clean(tmp_path):
    folders = [
        tmp_path / "a" / "run",
        tmp_path / "b" / "run",
        tmp_path / "lr=0.01:r=8",
        tmp_path / "ä#?/%.",
        Path("."),
        Path("/"),
    ]
    ids = [new_run_id(folder) for folder in folders for _ in range(2)]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}", name) for name in ids), ids
    assert ids[0].startswith("run-") and ids[4].startswith("lr-0.01-r-8-")
    assert len(new_run_id(tmp_path / ("x" * 200))) < 64


def _tracked(options, finish_processes, tmp_path):
    """Two folders called alike, of which the first is resumed; its name is none that trackers would take."""
    first, second = (tmp_path / part / "lr=0.01:r=8" for part in ("a", "b"))
    finish_processes({**options, "output_dir": str(first)})
    shutil.rmtree(first / "checkpoints" / "step-00000006")
    assert "resuming from" in finish_processes({**options, "output_dir": str(first)})[0]
    finish_processes({**options, "output_dir": str(second)})
    states = [sorted((folder / "checkpoints").glob("*/run_state.json")) for folder in (first, second)]
    ids = [{json.loads(path.read_text())["run_id"] for path in paths} for paths in states]
    assert [len(found) for found in ids] == [1, 1] and ids[0] != ids[1]
    return ids[0] | ids[1]


def test_trackio_sees_two_runs_of_which_one_was_resumed(options, finish_processes, tmp_path, monkeypatch):
    if importlib.util.find_spec("trackio") is None:  # importing it here would settle where it writes
        pytest.skip("trackio is not installed")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    options.update(report_to=["trackio"])
    ids = _tracked(options, finish_processes, tmp_path)
    (database,) = (tmp_path / "trackio").glob("dtem-hf*.db")
    with sqlite3.connect(database) as connection:
        steps = connection.execute("SELECT DISTINCT run_name, step FROM metrics").fetchall()
    assert {name for name, _ in steps} == ids
    for name in ids:
        assert {step for found, step in steps if found == name} >= {1, 2, 3, 4, 5, 6}


def test_wandb_sees_two_runs_of_which_one_was_resumed(options, finish_processes, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    options.update(report_to=["wandb"])
    ids = _tracked(options, finish_processes, tmp_path)
    runs = [path.name.split("-", 3)[3] for path in tmp_path.glob("*/*/wandb/offline-run-*")]
    assert set(runs) == ids and len(runs) == 3
