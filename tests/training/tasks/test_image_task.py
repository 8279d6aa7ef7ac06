"""Training reads labels as evaluation does: by the names of the model's classes."""

import json
import shutil

import pytest

from dtem_hf import BadValue
from dtem_hf.training.arguments import TrainArguments
from dtem_hf.training.tasks import make_task


@pytest.fixture
def named(options, image_folder, tmp_path):
    """A model whose five classes have names, and a folder for each name, in another order than the model's."""
    names = ["wolf", "ant", "heron", "bee", "cat"]
    model = tmp_path / "model"
    shutil.copytree(options["model"], model)
    config = json.loads((model / "config.json").read_text())
    config |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    (model / "config.json").write_text(json.dumps(config))
    for i in range(20):
        (tmp_path / "data" / names[i % 5]).mkdir(parents=True, exist_ok=True)
        shutil.copy(image_folder / f"{i}.png", tmp_path / "data" / names[i % 5] / f"{i}.png")
    return {**options, "model": str(model), "data": str(tmp_path / "data"), "validation_size": 5}


def load(options, **changes):
    arguments = TrainArguments(**{**options, **changes})
    task = make_task(arguments.task, arguments)
    data = task.load_data(task.load_model())
    return [(part.name_of(i), part[i]["labels"]) for part in (data.train, data.validation) for i in range(len(part))]


@pytest.mark.parametrize("task", ["classification", "distillation"])
def test_folders_are_matched_by_the_names_of_the_models_classes(named, task):
    found = load(named, task=task)
    assert len(found) == 20
    for name, label in found:
        assert label == int(name.rsplit("/", 1)[-1].removesuffix(".png")) % 5
    assert {label for _, label in load(named, task=task, label_column="none")} == {-1}


def test_unknown_classes_are_refused_or_left_out(named, tmp_path, capsys):
    (tmp_path / "data" / "cat").rename(tmp_path / "data" / "fish")
    shutil.copytree(tmp_path / "data" / "bee", tmp_path / "data" / "hornet")
    with pytest.raises(BadValue, match=r"data=\['fish', 'hornet'\]: class names of the model, which has 5"):
        load(named, task="classification")
    assert {label for _, label in load(named, task="distillation")} == {-1}
    assert "labels are not used: data=" in capsys.readouterr().err
