"""What a run writes down: the same figures in metrics.jsonl and in the trackers' own files."""

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_processes import outcome

from dtem_hf import BadValue
from dtem_hf.training.arguments import TrainArguments
from dtem_hf.training.program import train
from dtem_hf.training.trackers import flat


def lines(output_dir):
    return [json.loads(line) for line in Path(output_dir, "metrics.jsonl").read_text().splitlines()]


def test_tensorboard_holds_what_metrics_jsonl_holds_and_images_per_second(options, finish_processes):
    options.update(report_to=["tensorboard"], glance_every=2)
    finish_processes(options)
    events = EventAccumulator(str(Path(options["output_dir"], "logs", "dtem-hf")))
    events.Reload()
    expected = {}
    for line in lines(options["output_dir"]):
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
    with pytest.raises(BadValue, match=r"report_to='bulletin': none, or .* installed here: .*tensorboard"):
        train(TrainArguments(**{**options, "report_to": ["bulletin"]}))
