"""Data of every kind feeds a run: streams that are cut off, broken images, and numbers of steps from epochs."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from dtem_hf import BadValue
from dtem_hf.errors import UnreadableImage
from dtem_hf.training.arguments import TrainArguments
from dtem_hf.training.program import train
from tests.support.training_processes import logged, outcome, wait_for_step


@pytest.fixture
def streamed(options, tmp_path):
    """Options of a run on a stream of parquet shards."""
    draw = np.random.default_rng(0)
    for split, shards in (("train", 4), ("validation", 1)):
        for shard in range(shards):
            pictures = [Image.fromarray(draw.integers(0, 256, (40, 36, 3), dtype=np.uint8)) for _ in range(11)]
            rows = Dataset.from_dict({"image": pictures, "label": [i % 5 for i in range(11)]})
            rows.to_parquet(str(tmp_path / "data" / f"{split}-{shard:05d}-of-{shards:05d}.parquet"))
    data = str(tmp_path / "data")
    options.update(data=data, validation_data=data, streaming=True, shuffle_buffer=7, augmentation="flip")
    return options


@pytest.mark.parametrize("num_processes", [1, 2])
def test_killed_run_on_a_stream_resumes_to_the_same_bits(
    streamed, start_processes, finish_processes, tmp_path, num_processes
):
    streamed.update(steps=24, checkpoint_every=3)
    whole, cut = ({**streamed, "output_dir": str(tmp_path / name)} for name in ("whole", "cut"))
    finish_processes(whole, num_processes)
    processes = start_processes({**cut, "num_workers": 1}, num_processes)
    wait_for_step(cut["output_dir"], 5, processes)
    for process in processes:
        process.kill()
        process.join()
    assert "resuming from" in finish_processes(cut, num_processes)[0]
    assert outcome(cut["output_dir"]) == outcome(whole["output_dir"])


def test_stream_needs_images_to_validate_on_and_steps(streamed):
    with pytest.raises(BadValue, match=r"validation_data=None: images to validate on"):
        train(TrainArguments(**{**streamed, "validation_data": None}))
    with pytest.raises(BadValue, match=r"epochs=2.*steps instead"):
        train(TrainArguments(**{**streamed, "epochs": 2}))


def test_epochs_are_counted_in_images_of_all_steps(options):
    summary = train(TrainArguments(**{**options, "epochs": 1.5, "gradient_accumulation_steps": 2}))
    assert summary["steps"] == round(1.5 * 40 / (4 * 2)) and summary["images_seen"] == 64


@pytest.fixture
def broken(options, image_folder, tmp_path):
    """Options of a run on images of which two cannot be read."""
    data = tmp_path / "broken"
    shutil.copytree(image_folder, data)
    (data / "11.png").write_bytes((data / "11.png").read_bytes()[:60])
    (data / "30.png").write_text("no image")
    return {**options, "data": str(data), "steps": 24}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_unreadable_image_ends_a_run_and_is_named(broken, num_workers):
    with pytest.raises(UnreadableImage, match=r"(11|30)\.png cannot be read"):
        train(TrainArguments(**{**broken, "num_workers": num_workers}))


def test_unreadable_images_are_left_out_and_counted(broken, capsys):
    summary = train(TrainArguments(**{**broken, "on_bad_image": "skip", "validation_size": 1}))
    printed = capsys.readouterr().out
    assert summary["steps"] == 24 and summary["unreadable_images"] == 2
    assert printed.count("left out: image") == 2 and "11.png" in printed and "30.png" in printed
    assert "2 unreadable images were left out" in printed


def test_unreadable_image_changes_nothing_about_the_figures_of_the_others(broken, image_folder, tmp_path):
    """Validation on seven whole images and a broken one is validation on the seven."""
    figures = []
    for name in ("broken", "whole"):
        data = tmp_path / f"held-out-{name}"
        data.mkdir()
        numbers = range(8) if name == "broken" else range(1, 8)
        rows = ["file,label"]
        for number in numbers:
            shutil.copy(image_folder / f"{number}.png", data)
            rows.append(f"{number}.png,{number % 5}")
        (data / "labels.csv").write_text("\n".join(rows))
        if name == "broken":
            (data / "0.png").write_text("no image")
        options = {**broken, "validation_data": str(data), "on_bad_image": "skip", "output_dir": str(tmp_path / name)}
        train(TrainArguments(**{**options, "steps": 1}))
        figures.append(logged(options["output_dir"], "validation")[0])
    assert figures[0] == pytest.approx(figures[1], rel=1e-5)


def test_batch_without_a_readable_image_is_an_error(broken):
    for file in Path(broken["data"]).glob("*.png"):
        file.write_text("no image")
    with pytest.raises(UnreadableImage, match=r"png cannot be read"):
        train(TrainArguments(**{**broken, "on_bad_image": "skip"}))


def test_labels_out_of_range_are_named_in_front_of_the_first_step(broken):
    with open(Path(broken["data"], "labels.csv"), "a") as file:
        file.write("7.png,5\n")
    with pytest.raises(BadValue, match=r"label=5: image 48 needs a number below the model's 5 classes \(.*7.png\)"):
        train(TrainArguments(**broken))
    assert not os.path.exists(broken["output_dir"])
