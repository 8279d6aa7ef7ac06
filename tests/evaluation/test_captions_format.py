"""Caption files: COCO's two formats and Karpathy's, and what is said of files that are neither."""

import json

import pytest

from dtem_hf import BadValue
from dtem_hf.data.captions import has_splits, read_annotations, read_predictions, write_predictions


COCO = {
    "info": {"year": 2017},
    "images": [{"id": 7, "file_name": "b.jpg"}, {"id": 3, "file_name": "a.jpg"}, {"id": 9, "file_name": "c.jpg"}],
    "annotations": [
        {"id": 1, "image_id": 3, "caption": "A dog."},
        {"id": 2, "image_id": 7, "caption": "A cat."},
        {"id": 4, "image_id": 3, "caption": "A brown dog."},
    ],
}
KARPATHY = {
    "dataset": "coco",
    "images": [
        {"split": "test", "cocoid": 5, "filepath": "val2014", "filename": "x.jpg", "sentences": [{"raw": "A bus."}]},
        {"split": "train", "cocoid": 6, "filepath": "train", "filename": "y.jpg", "sentences": [{"raw": "A car."}]},
        {"split": "test", "imgid": 2, "filename": "z.jpg", "sentences": [{"raw": "A"}, {"raw": "B"}]},
    ],
}  # fmt: skip


@pytest.fixture
def write(tmp_path):
    def to_file(content):
        (tmp_path / "file.json").write_text(json.dumps(content))
        return tmp_path / "file.json"

    return to_file


def test_coco_annotations_by_image_in_the_files_order(write):
    images = read_annotations(write(COCO))
    assert [(k, v.file_name, v.captions) for k, v in images.items()] == [
        (7, "b.jpg", ["A cat."]),
        (3, "a.jpg", ["A dog.", "A brown dog."]),
    ]


def test_karpathy_split_by_coco_id(write):
    images = read_annotations(write(KARPATHY), "test")
    assert [(k, v.file_name, v.captions) for k, v in images.items()] == [
        (5, "val2014/x.jpg", ["A bus."]),
        (2, "z.jpg", ["A", "B"]),
    ]


def test_karpathy_splits_are_joined_by_plus(write):
    assert list(read_annotations(write(KARPATHY), "train+test")) == [5, 6, 2]


def test_table_of_images_and_captions(tmp_path):
    path = tmp_path / "captions.txt"
    path.write_text('image,caption\nb.jpg,A cat .\na.jpg,"A dog, brown"\nb.jpg,A black cat\n')
    images = read_annotations(path)
    assert [(k, v.file_name, v.captions) for k, v in images.items()] == [
        (0, "b.jpg", ["A cat .", "A black cat"]),
        (1, "a.jpg", ["A dog, brown"]),
    ]
    path.write_text(path.read_text(), encoding="utf-8-sig")  # as Excel writes it
    assert read_annotations(path) == images
    with pytest.raises(BadValue, match=r"split='train': no split: captions\.txt is a table"):
        read_annotations(path, "train")


def test_only_karpathys_file_has_splits(write, tmp_path):
    (tmp_path / "captions.txt").write_text("image,caption\n")
    assert has_splits(write(KARPATHY))
    assert not has_splits(write(COCO)) and not has_splits(tmp_path / "captions.txt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("file,text\na.png,x\n", "the columns image and caption"),
        ("image,caption\n", "at least one image with a caption"),
        ("image,caption\na.png,\n", "line 2.*an image and a caption"),
        ("image,caption\na.png,A cat\nb.png,A dog, brown\n", r"line 3=\[' brown'\]: 2 fields.*quote commas"),
    ],
)
def test_tables_that_cannot_be_read_are_named(tmp_path, content, message):
    (tmp_path / "c.txt").write_text(content)
    with pytest.raises(BadValue, match=message):
        read_annotations(tmp_path / "c.txt")


def test_predictions_come_back_as_written(tmp_path):
    captions = {12: "Ein Hund – draußen", 3: ""}
    write_predictions(tmp_path / "r.json", captions)
    assert json.loads((tmp_path / "r.json").read_text()) == [
        {"image_id": 12, "caption": "Ein Hund – draußen"},
        {"image_id": 3, "caption": ""},
    ]
    assert read_predictions(tmp_path / "r.json") == captions


@pytest.mark.parametrize(
    ("content", "split", "message"),
    [
        ([], None, r"file.json='list'.*'images'"),
        ({"images": []}, None, "split=None"),
        (KARPATHY, None, "split=None: one of the splits in file.json: test, train"),
        (KARPATHY, "val", "split='val': one of the splits in file.json: test, train"),
        (COCO, "test", "split='test'.*COCO's format"),
        ({"images": [{"id": "7"}], "annotations": []}, None, r"images\[0\].id='7': a whole number"),
        ({"images": [{"id": True}], "annotations": []}, None, r"images\[0\].id=True"),
        ({"images": [{"id": 1}], "annotations": []}, None, "at least one image with a caption"),
        ({"images": [{"id": 1}], "annotations": [{"image_id": 2, "caption": "x"}]}, None, r"\[0\].image_id=2"),
        ({"images": [{"id": 1}], "annotations": [{"image_id": 1, "caption": 4}]}, None, r"\[0\].caption=4: text"),
        ({"images": [3], "annotations": []}, None, r"images\[0\]=3: an object"),
    ],
)  # fmt: skip
def test_annotations_of_no_known_format_are_named(write, content, split, message):
    with pytest.raises(BadValue, match=message):
        read_annotations(write(content), split)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "at least one"),
        ({"image_id": 1}, "file.json='dict'"),
        ([{"image_id": 1, "caption": "a"}, {"image_id": 1, "caption": "b"}], r"file.json\[1\].image_id=1.*has two"),
        ([{"image_id": "1", "caption": "a"}], r"file.json\[0\].image_id='1'"),
        ([{"image_id": 1}], r"file.json\[0\].caption=None: text"),
    ],
)
def test_predictions_of_another_format_are_named(write, content, message):
    with pytest.raises(BadValue, match=message):
        read_predictions(write(content))
