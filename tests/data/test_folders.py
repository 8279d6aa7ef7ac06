"""Every image of a folder is read, whatever its folders are called, and what is left out is said."""

from __future__ import annotations

import json

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from dtem_hf import BadValue
from dtem_hf.data.images import data_digest, load_images, stream_images


def write_picture(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 5, 3), value, dtype=np.uint8)).save(path)


def classes_of(images):
    """The class name of every image, by its file's name."""
    names = images.features["label"].names
    rows = images.with_format("arrow")[:]
    paths = [image["path"] for image in rows["image"].to_pylist()]
    return {path.rsplit("/", 1)[-1]: names[label] for path, label in zip(paths, images["label"], strict=True)}


@pytest.mark.parametrize(
    "names",
    [("train", "test_tube"), ("bullet train", "cat"), ("test", "validation_stamp", "eval"), ("dev", "ant")],
)
def test_class_folders_may_be_called_like_splits(tmp_path, names):
    expected = {}
    for name in names:
        for i in range(20):
            file = f"{name}-{i}.png"
            write_picture(tmp_path / name / file, i)
            expected[file] = name
    for split in ("train", "validation"):
        assert classes_of(load_images(str(tmp_path), split)) == expected
    assert len(list(stream_images(str(tmp_path)))) == len(expected)


@pytest.mark.parametrize("above", ["", "data/"])
def test_folders_that_are_all_splits_are_read_as_such_and_said(tmp_path, above, capsys):
    for split, count in (("train", 3), ("val", 2)):
        for name in ("ant", "bee"):
            for i in range(count):
                write_picture(tmp_path / f"{above}{split}/{name}/{split}{i}{name}.png")
    assert len(load_images(str(tmp_path), "train")) == 6
    assert set(classes_of(load_images(str(tmp_path), "validation")).values()) == {"ant", "bee"}
    assert "4 of 10 images" in capsys.readouterr().err
    with pytest.raises(BadValue, match="split='test': one of train, validation"):
        load_images(str(tmp_path), "test")


def test_images_beside_and_below_class_folders_are_read(tmp_path):
    write_picture(tmp_path / "cover.png")
    write_picture(tmp_path / "bird" / "owl" / "a.png")
    write_picture(tmp_path / "bird" / "b.PNG")
    write_picture(tmp_path / "cat" / "c.png")
    images = load_images(str(tmp_path))
    names = images.features["label"].names
    assert [names[label] if label >= 0 else None for label in images["label"]] == ["bird", "bird", "cat", None]


def test_linked_class_folders_are_read_and_loops_end(tmp_path):
    write_picture(tmp_path / "elsewhere" / "x.png")
    write_picture(tmp_path / "data" / "cat" / "a.png")
    (tmp_path / "data" / "dog").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "data", target_is_directory=True)
    images = load_images(str(tmp_path / "data"))
    names = images.features["label"].names
    assert sorted(names[label] for label in images["label"]) == ["cat", "dog"]


def test_metadata_beside_class_folders(tmp_path, capsys):
    lines = []
    for i, name in enumerate(("ant", "bee", "ant")):
        write_picture(tmp_path / name / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{name}/{i}.png", "fine": f"small {name}", "text": "a picture"}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    assert classes_of(load_images(str(tmp_path))) == {"0.png": "ant", "1.png": "bee", "2.png": "ant"}
    fine = load_images(str(tmp_path), label_column="fine")
    assert classes_of(fine)["1.png"] == "small bee"
    with pytest.raises(BadValue, match="label_column='coarse': one of the columns fine, text"):
        load_images(str(tmp_path), label_column="coarse")
    assert "no labels" not in capsys.readouterr().err
    assert load_images(str(tmp_path), label_column="none")["label"] == [-1, -1, -1]


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_a_line_separator_inside_a_cell_of_the_metadata_is_text(tmp_path, name):
    """U+2028, which JSON and CSV may hold as it is, ends a line for `str.splitlines`."""
    rows = [{"file_name": f"{i}.png", "text": "one\u2028two", "label": label} for i, label in enumerate("ba")]
    for row in rows:
        write_picture(tmp_path / row["file_name"])
    jsonl = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    csv = "\n".join(",".join(cells) for cells in (rows[0], *(row.values() for row in rows)))
    (tmp_path / name).write_text(jsonl if name.endswith("jsonl") else csv, encoding="utf-8")
    assert classes_of(load_images(str(tmp_path))) == {"0.png": "b", "1.png": "a"}


def test_a_cell_too_many_in_the_metadata_is_named(tmp_path):
    write_picture(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text,label\na.png,small, brown,ant\n")
    with pytest.raises(BadValue, match=r"metadata\.csv line 2=\['ant'\]: 3 fields; quote commas"):
        load_images(str(tmp_path))


def test_why_there_are_no_labels_is_said(tmp_path, capsys):
    write_picture(tmp_path / "a.png")
    assert load_images(str(tmp_path))["label"] == [-1]
    assert (
        "no labels: the images are not in two or more class folders, and there is no labels.csv"
        in capsys.readouterr().err
    )


def test_columns_are_named_where_none_is_of_labels(tmp_path, capsys):
    picture = Image.new("RGB", (4, 4))
    table = Dataset.from_dict({"image": [picture] * 2, "fine_label": [3, 4], "target": [0, 1]})
    table.to_parquet(str(tmp_path / "a.parquet"))
    assert load_images(str(tmp_path))["label"] == [-1, -1]
    assert (
        "the columns of the data are image, fine_label, target; choose one with --label_column"
        in capsys.readouterr().err
    )
    assert load_images(str(tmp_path), label_column="fine_label")["label"] == [3, 4]
    assert [row["label"] for row in stream_images(str(tmp_path), label_column="target")] == [0, 1]
    with pytest.raises(BadValue, match="label_column='coarse': one of the columns image, fine_label, target"):
        load_images(str(tmp_path), label_column="coarse")


def test_every_shard_is_read_or_named(tmp_path):
    def write(name, labels):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_dict({"image": [Image.new("RGB", (4, 4))] * len(labels), "label": labels}).to_parquet(
            str(tmp_path / name)
        )

    write("a/part-0.parquet", [0])
    write("a/part-1.parquet", [1])
    assert load_images(str(tmp_path / "a"), "validation")["label"] == [0, 1]
    write("a/train-2.parquet", [2])
    with pytest.raises(BadValue, match=r"all name a split, or none; part-0\.parquet does not"):
        load_images(str(tmp_path / "a"))
    write("b/my-val-0.parquet", [3])
    write("b/training/0.parquet", [4])
    assert load_images(str(tmp_path / "b"), "validation")["label"] == [3]
    assert load_images(str(tmp_path / "b"), "train")["label"] == [4]
    write_picture(tmp_path / "b" / "x.png")
    with pytest.raises(BadValue, match="images or of shards, not both"):
        load_images(str(tmp_path / "b"))


def test_labels_csv_with_a_byte_order_mark_and_another_column(tmp_path):
    write_picture(tmp_path / "a.png")
    (tmp_path / "labels.csv").write_text("file,label,coarse\na.png,7,2\n", encoding="utf-8-sig")
    assert load_images(str(tmp_path))["label"] == [7]
    assert load_images(str(tmp_path), label_column="coarse")["label"] == [2]
    assert load_images(str(tmp_path), label_column="none")["label"] == [-1]
    (tmp_path / "labels.csv").write_text("file,label\na.png,7,2\n")
    with pytest.raises(BadValue, match=r"labels\.csv line 2=\['2'\]: 2 fields"):
        load_images(str(tmp_path))


def test_a_digest_tells_names_labels_and_content(tmp_path):
    for i in range(3):
        write_picture(tmp_path / f"{i}.png", i)

    def written(labels):
        rows = "".join(f"{i}.png,{label}\n" for i, label in enumerate(labels))
        (tmp_path / "labels.csv").write_text(f"file,label\n{rows}")
        return data_digest(load_images(str(tmp_path)))

    first = written([0, 1, 2])
    assert written([0, 1, 2]) == first
    assert written([0, 2, 1]) != first
    write_picture(tmp_path / "1.png", 9)
    assert written([0, 1, 2]) != first
    kept = Dataset.from_dict({"image": [Image.new("RGB", (4, 4), c) for c in ("red", "blue")], "label": [0, 1]})
    kept.to_parquet(str(tmp_path / "p" / "a.parquet")) if (tmp_path / "p").mkdir() is None else None
    (tmp_path / "labels.csv").unlink()
    assert data_digest(load_images(str(tmp_path / "p"))) != data_digest(load_images(str(tmp_path / "p"), limit=1))


def test_files_that_are_left_out_are_said(tmp_path, capsys):
    for name in ("a/1.png", "b/2.PNG"):
        write_picture(tmp_path / name)
    for name in ("b/3.heic", "b/4.heic", "b/notes"):
        (tmp_path / name).write_bytes(b"ftypheic")
    assert len(load_images(str(tmp_path))) == 2
    assert "does not open, are left out: 1 × no ending, 2 × .heic" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["labels.csv", "metadata.csv", "metadata.jsonl"])
def test_a_table_in_another_encoding_is_named(tmp_path, name):
    write_picture(tmp_path / "a.png")
    (tmp_path / name).write_bytes("file,label\na.png,café\n".encode("latin-1"))
    with pytest.raises(BadValue, match=rf"^{name}='{tmp_path}.*': a .* in UTF-8"):
        load_images(str(tmp_path))


@pytest.mark.parametrize("name", ["here/nothing", "here/loop", "a/b/nothing"])
def test_a_missing_folder_is_not_looked_for_on_the_hub(tmp_path, monkeypatch, name):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"there is no folder {name}"):
        load_images(name)
