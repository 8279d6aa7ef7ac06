"""Images come out of every supported layout with their labels, are augmented reproducibly, and bad data is named."""

import io
import tarfile

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import ViTImageProcessorPil

from dtem_hf import BadValue
from dtem_hf.data.classes import check_labels
from dtem_hf.data.images import ProcessedImages, collate, first_rows, load_images, stream_images
from dtem_hf.errors import UnreadableImage
from dtem_hf.opening import open_image


def picture(value, size=(24, 20)):
    return Image.fromarray(np.full((size[1], size[0], 3), value, dtype=np.uint8))


@pytest.fixture
def csv_folder(tmp_path):
    (tmp_path / "sub").mkdir()
    for i, name in enumerate(("a.png", "sub/b.png", "c.png")):
        picture(40 * i).save(tmp_path / name)
    (tmp_path / "labels.csv").write_text("file,label,name\na.png,4,cat\nsub/b.png,,\nc.png,0,dog\n")
    return tmp_path


def test_folder_with_labels_csv(csv_folder):
    images = load_images(str(csv_folder))
    assert images["label"] == [4, -1, 0]
    assert [np.asarray(image)[0, 0, 0] for image in images["image"]] == [0, 40, 80]
    assert load_images(str(csv_folder), limit=2)["label"] == [4, -1]


def test_folder_of_class_folders(tmp_path):
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        for i in range(2):
            picture(10).save(tmp_path / name / f"{i}.png")
    assert load_images(str(tmp_path))["label"] == [0, 0, 1, 1]


def test_dataset_by_name_and_split(tmp_path, monkeypatch):
    """What is no folder of images goes to `datasets.load_dataset`, here with a local repository of parquet files."""
    folder = tmp_path / "photos" / "data"
    folder.mkdir(parents=True)
    for split, labels in (("train", [1, 0]), ("validation", [3])):
        table = Dataset.from_dict({"image": [picture(label) for label in labels], "label": labels})
        table.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    loaded = load_images(str(tmp_path / "photos"), split="validation")
    assert loaded["label"] == [3]


def test_images_without_labels(tmp_path):
    for i in range(3):
        picture(i).save(tmp_path / f"{i}.png")
    assert load_images(str(tmp_path))["label"] == [-1, -1, -1]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("label,file\n3\n", "line 2=None: a file inside the folder"),
        ("file,label\n../outside.png,1\n", r"line 2='../outside.png': a file inside the folder"),
        ("file,label\na.png,4\nmissing.png,1\n", "line 3: there is no missing.png"),
        ("file,label\na.png,four\n", "line 2='four': a whole number"),
        ("path,class\na.png,4\n", "columns file and label"),
        ("file,label\n", "at least one image"),
    ],
)
def test_bad_labels_csv_names_the_line(csv_folder, rows, message):
    picture(0).save(csv_folder.parent / "outside.png")
    (csv_folder / "labels.csv").write_text(rows)
    with pytest.raises((BadValue, FileNotFoundError), match=message):
        load_images(str(csv_folder))


def test_missing_folder_is_named():
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_images("./nowhere")


@pytest.fixture
def noise(tmp_path):
    draw = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(draw.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "labels.csv").write_text("file,label\n0.png,0\n1.png,1\n2.png,2\n")
    return load_images(str(tmp_path))


PROCESSOR = ViTImageProcessorPil(
    size={"shortest_edge": 24}, crop_size={"height": 16, "width": 16}, do_center_crop=True, do_resize=True
)


def test_without_augmentation_it_is_the_processor_alone(noise):
    item = ProcessedImages(noise, PROCESSOR)[1]
    expected = PROCESSOR(noise[1]["image"], return_tensors="pt").pixel_values[0]
    assert torch.equal(item["pixel_values"], expected) and item["labels"] == 1 and item["index"] == 1


def test_augmentation_depends_on_seed_epoch_and_index_alone(noise):
    images = ProcessedImages(noise, PROCESSOR, augmentation="crop_flip", seed=5)
    again = ProcessedImages(noise, PROCESSOR, augmentation="crop_flip", seed=5)
    drawn = [images[epoch, 2]["pixel_values"] for epoch in range(8)]
    assert all(torch.equal(again[epoch, 2]["pixel_values"], drawn[epoch]) for epoch in reversed(range(8)))
    assert len({tuple(pixels.flatten().tolist()) for pixels in drawn}) > 4


def test_every_crop_is_a_window_of_the_resized_image_perhaps_mirrored(noise):
    images = ProcessedImages(noise, PROCESSOR, augmentation="crop_flip")
    whole = PROCESSOR(noise[0]["image"], do_center_crop=False, return_tensors="pt").pixel_values[0]
    assert whole.shape == (3, 24, 32)
    windows = [whole[:, y : y + 16, x : x + 16] for y in range(9) for x in range(17)]
    flips = 0
    for epoch in range(10):
        pixels = images[epoch, 0]["pixel_values"]
        straight = any(torch.equal(pixels, window) for window in windows)
        mirrored = any(torch.equal(pixels.flip(-1), window) for window in windows)
        assert straight or mirrored
        flips += mirrored
    assert 0 < flips < 10


def test_label_out_of_range_is_named(noise):
    with pytest.raises(BadValue, match=r"label=2: image 2 needs a number below the model's 2 classes"):
        ProcessedImages(noise, PROCESSOR, num_labels=2)[2]


def test_images_of_several_sizes_do_not_make_a_batch(noise):
    items = [{"pixel_values": torch.zeros(3, n, n), "labels": 0, "index": n} for n in (4, 5)]
    with pytest.raises(BadValue, match="images of one size"):
        collate(items)


def test_webdataset_shards_and_columns_of_other_names(tmp_path):
    """An image called `jpg` or `img`, a label called `cls` or `labels`."""
    with tarfile.open(tmp_path / "train-0000.tar", "w") as tar:
        for i in range(3):
            encoded = io.BytesIO()
            picture(40 * i).save(encoded, "png")
            for name, content in ((f"{i}.png", encoded.getvalue()), (f"{i}.cls", b"%d" % (2 - i))):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    images = load_images(str(tmp_path))
    assert images["label"] == [2, 1, 0]
    assert [np.asarray(image)[0, 0, 0] for image in images["image"]] == [0, 40, 80]
    other = tmp_path / "other"
    other.mkdir()
    Dataset.from_dict({"img": [picture(7)], "labels": [4]}).to_parquet(str(other / "train.parquet"))
    assert load_images(str(other))["label"] == [4]
    (row,) = stream_images(str(other))
    assert row["label"] == 4 and np.asarray(open_image(row["image"], "it"))[0, 0, 0] == 7


def test_folder_with_labels_csv_can_be_streamed(csv_folder):
    rows = list(stream_images(str(csv_folder)))
    assert sorted(row["label"] for row in rows) == [-1, 0, 4]
    assert [row["label"] for row in first_rows(stream_images(str(csv_folder)), 2, "x")] == [
        row["label"] for row in rows[:2]
    ]


def test_labels_that_are_text_are_names_and_others_are_refused(tmp_path):
    for name, labels in (("text", ["cat", "ant", "cat"]), ("float", [0.5, 1.0, 2.0])):
        (tmp_path / name).mkdir()
        table = Dataset.from_dict({"image": [picture(7)] * 3, "label": labels})
        table.to_parquet(str(tmp_path / name / "train.parquet"))
    images = load_images(str(tmp_path / "text"))
    assert images["label"] == [1, 0, 1] and images.features["label"].names == ["ant", "cat"]
    with pytest.raises(BadValue, match="whole numbers as labels, not float64"):
        load_images(str(tmp_path / "float"))
    with pytest.raises(BadValue, match="whole numbers as labels, not string"):
        stream_images(str(tmp_path / "text"))


@pytest.mark.parametrize("name", [None, "readme.txt"])
def test_folder_without_images_is_named(tmp_path, name):
    if name:
        (tmp_path / name).write_text("")
    with pytest.raises(BadValue, match=r"data=.*at least one image"):
        load_images(str(tmp_path))


@pytest.mark.parametrize("label", [3, -2])
def test_labels_are_checked_in_front_of_a_run(csv_folder, label):
    (csv_folder / "labels.csv").write_text(f"file,label\na.png,2\nsub/b.png,{label}\nc.png,\n")
    images = load_images(str(csv_folder))
    with pytest.raises(
        BadValue, match=rf"label={label}: image 1 needs a number below the model's 3 classes \(.*b.png\)"
    ):
        check_labels(images, 3)
    (csv_folder / "labels.csv").write_text("file,label\na.png,2\nsub/b.png,\nc.png,0\n")
    check_labels(load_images(str(csv_folder)), 3)


@pytest.mark.parametrize("damage", ["cut off", "text", "empty", "gone"])
def test_unreadable_image_is_named(csv_folder, damage):
    path, rng = csv_folder / "sub" / "b.png", np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    images = ProcessedImages(load_images(str(csv_folder)), PROCESSOR)
    whole = path.read_bytes()
    {
        "cut off": lambda: path.write_bytes(whole[: len(whole) // 2]),
        "text": lambda: path.write_text("no image at all"),
        "empty": lambda: path.write_bytes(b""),
        "gone": path.unlink,
    }[damage]()
    assert images[0]["index"] == 0
    with pytest.raises(UnreadableImage, match=r"b\.png cannot be read"):
        images[1]
