"""Labels mean the model's classes by name, by wnid, by number; by order only where nothing else is possible."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from transformers import ViTConfig

from dtem_hf import BadValue
from dtem_hf.data.classes import match_classes, match_labels
from dtem_hf.data.images import load_images, stream_images


ANIMALS = {
    0: "tabby, tabby cat",
    1: "Irish setter",
    2: "great_white_shark",
    3: "crane",
    4: "crane",
    5: "Koi",
    6: "koi",
}
UNNAMED = {i: f"LABEL_{i}" for i in range(3)}


def folders(root, names):
    for name in names:
        (root / name).mkdir(parents=True)
        Image.fromarray(np.zeros((4, 4, 3), dtype=np.uint8)).save(root / name / "0.png")
    return load_images(str(root))


@pytest.mark.parametrize(
    ("names", "ids", "how"),
    [
        (["Koi", "irish-setter", "koi"], [5, 1, 6], "names"),  # Cardigan is a dog of ImageNet's, and cardigan is none
        (["tabby", "tabby cat", "tabby, tabby cat"], [0, 0, 0], "names"),
        (["Great White Shark, man-eater"], [2], "names"),
        (["5", "0", "3"], [5, 0, 3], "class numbers"),
        (["tabby", "Irish setter", "white shark", "crane (bird)", "crane", "Koi", "koi"], range(7), "names"),
    ],
)
def test_names_tell_the_class(names, ids, how):
    found = match_classes(names, ANIMALS)
    assert (found.ids, found.how) == (list(ids), how)


@pytest.mark.parametrize("names", [["tabby", "poodle"], ["a", "b"], ["9", "1"]])
def test_names_that_do_not_tell_it_are_refused(names):
    with pytest.raises(BadValue, match=r"data=\['.*class names of the model, which has 7 \(tabby, tabby cat, Irish"):
        match_classes(names, ANIMALS)


def test_a_name_of_two_classes_counts_for_none_and_is_said(capsys):
    assert match_classes(["tabby", "crane", "KOI"], ANIMALS).ids == [0, -1, -1]
    assert "crane, KOI are not used, as the model has several classes of that name" in capsys.readouterr().err


def test_label2id_may_know_more_names():
    assert match_classes(["n02123045"], ANIMALS, {"n02123045": 0}).ids == [0]


def test_wnids_of_imagenet(shared):
    import csv
    import json

    id2label = json.loads((shared / "assets" / "deit_tiny" / "config.json").read_text())["id2label"]
    id2label = {int(i): name for i, name in id2label.items()}
    with open(shared / "assets" / "images" / "dev" / "labels.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if int(row["label"]) % 97 == 3]
    wnids = [row["file"].split(".")[0] for row in rows]
    assert match_classes(wnids, id2label).ids == [int(row["label"]) for row in rows]
    assert match_classes([f"{wnid}_{row['name']}" for wnid, row in zip(wnids, rows, strict=True)], id2label).ids == [
        int(row["label"]) for row in rows
    ]
    assert match_classes(wnids, {i: f"LABEL_{i}" for i in range(1000)}).ids[0] == int(rows[0]["label"])
    with pytest.raises(BadValue):
        match_classes(wnids, {i: f"animal {i}" for i in range(1000)})


def test_order_is_said_and_another_number_of_classes_refused(tmp_path, capsys):
    config = ViTConfig(id2label=UNNAMED)
    images = folders(tmp_path / "three", ["a", "b", "c"])
    found = match_labels(images, config)
    assert [found.class_of(label) for label in images["label"]] == [0, 1, 2] and found.how == "order"
    assert "the 3 classes of the data (a, b, c) are matched with the model's (LABEL_0, LABEL_1, LABEL_2)" in (
        capsys.readouterr().err
    )
    two = folders(tmp_path / "two", ["a", "b"])
    with pytest.raises(BadValue, match=r"2 of 2 names in the data are unknown.*--label_column none"):
        match_labels(two, config)
    left_out = match_labels(two, config, needed=False)
    assert [left_out.class_of(label) for label in (0, 1, -1)] == [-1, -1, -1]
    assert "labels are not used" in capsys.readouterr().err


def test_streamed_folders_are_matched_as_loaded_ones(tmp_path):
    folders(tmp_path, ["Koi", "Irish setter"])
    found = match_labels(stream_images(str(tmp_path)), ViTConfig(id2label=ANIMALS))
    assert sorted(found.class_of(row["label"]) for row in stream_images(str(tmp_path))) == [1, 5]
