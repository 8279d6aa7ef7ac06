"""A run resumes with the data, the processor and the weights that it was started with, or says what has changed."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from dtem_hf import BadValue, MergeAdapter
from dtem_hf.training.arguments import TrainArguments
from dtem_hf.training.program import train


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def mend_label(run):
    path = Path(run["data"], "labels.csv")
    lines = path.read_text().splitlines()
    file, label = lines[1].split(",")
    path.write_text("\n".join([lines[0], f"{file},{(int(label or 0) + 1) % 5}", *lines[2:]]))


def replace_image(run):
    """By one of the same name and size in bytes."""
    path = Path(run["data"], "7.png")
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)


def edit_processor(run):
    edit_json(Path(run["model"], "preprocessor_config.json"), image_mean=[0.4, 0.4, 0.4])


def edit_backbone(run):
    path = Path(run["model"], "model.safetensors")
    tensors = load_file(path)
    tensors[max(tensors)] += 0.25
    save_file(tensors, path, metadata={"format": "pt"})


def edit_captions(run):
    path = Path(run["captions"])
    path.write_text(path.read_text().replace("red left of red", "red beside red"))


@pytest.fixture
def started(options, tmp_path):
    """Starts a run with its own copies of all it reads; what came of it, and the options of the same command."""

    def start(given):
        copied = {**given, "model": str(tmp_path / "model"), "data": str(tmp_path / "data")}
        shutil.copytree(given["model"], copied["model"])
        shutil.copytree(given["data"], copied["data"])
        picture = Path(copied["data"], "7.png")
        Image.open(picture).save(picture, "bmp")  # not compressed
        if "captions" in given:
            copied["captions"] = str(tmp_path / "data" / Path(given["captions"]).name)
        train(TrainArguments(**{**copied, "validation_size": 4}))
        return {**copied, "validation_size": 4}

    return start


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (mend_label, "data="),
        (replace_image, "data="),
        (edit_processor, "model's processor="),
        (edit_backbone, "model="),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_run_does_not_go_on_with_what_has_changed(options, started, edit, named):
    run = started(options)
    edit(run)
    with pytest.raises(BadValue, match=rf"{named}.*its content has changed since: restore it, .*--resume never"):
        train(TrainArguments(**run))
    assert train(TrainArguments(**{**run, "resume": "never"}))["steps"] == 6


@pytest.mark.parametrize("folder", ["clip_folder", "git_folder"])
def test_nor_with_other_captions(caption_options, started, folder, request):
    task = {"task": "contrastive" if folder == "clip_folder" else "captioning"}
    run = started({**caption_options, **task, "model": str(request.getfixturevalue(folder))})
    edit_captions(run)
    with pytest.raises(BadValue, match=r"captions=.*its content has changed since"):
        train(TrainArguments(**run))


def test_nor_from_another_adapter(options, started, tmp_path):
    train(TrainArguments(**{**options, "output_dir": str(tmp_path / "first"), "init": "random"}))
    run = started({**options, "start_from": str(tmp_path / "first" / "adapter")})
    adapter = MergeAdapter.from_pretrained(tmp_path / "first" / "adapter")
    adapter.tensors = {name: value + 0.1 for name, value in adapter.tensors.items()}
    adapter.save_pretrained(tmp_path / "first" / "adapter")
    with pytest.raises(BadValue, match=r"start_from=.*its content has changed since"):
        train(TrainArguments(**run))


def test_a_stream_is_known_by_its_files(options, started):
    run = started({**options, "streaming": True, "validation_data": options["data"], "shuffle_buffer": 5})
    assert train(TrainArguments(**run))["steps"] == 6
    Image.new("RGB", (32, 32)).save(Path(run["data"], "new.png"))
    with pytest.raises(BadValue, match=r"data=.*its content has changed since"):
        train(TrainArguments(**run))


def test_files_that_were_touched_are_no_change(options, started):
    run = started(options)
    shutil.rmtree(Path(run["output_dir"], "checkpoints", "step-00000006"))
    for part in Path(run["data"]).iterdir():
        part.touch()
    assert train(TrainArguments(**{**run, "num_workers": 1}))["steps"] == 6


def test_a_finished_run_keeps_the_record_of_the_options_that_trained_it(options, started):
    run = started({**options, "batch_size": 4, "gradient_accumulation_steps": 1})
    adapter = Path(run["output_dir"], "adapter")
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    record = train(TrainArguments(**{**run, "batch_size": 2, "gradient_accumulation_steps": 2}))
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before
    assert record == json.loads(before["training.json"]) and record["arguments"]["batch_size"] == 4
