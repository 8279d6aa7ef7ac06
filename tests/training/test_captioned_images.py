"""Captioned images: which caption an image comes with, which images are held out, and Karpathy's splits."""

import json
from pathlib import Path

import pytest

from dtem_hf.data.captioned_images import CaptionedImages, hold_out
from dtem_hf.data.captions import read_annotations
from dtem_hf.opening import load_processor
from dtem_hf.training.arguments import TrainArguments
from dtem_hf.training.tasks.caption_task import load_captioned_images


@pytest.fixture
def processor(vit_folder):
    return load_processor(str(vit_folder))


def test_caption_is_drawn_from_seed_epoch_and_index(captioned_folder, processor):
    images = read_annotations(captioned_folder / "captions.txt")
    data = CaptionedImages(images, captioned_folder, processor, seed=3)
    drawn = [[data[epoch, i]["caption"] for i in range(24)] for epoch in range(12)]
    again = CaptionedImages(images, captioned_folder, processor, seed=3)
    assert [again[5, i]["caption"] for i in reversed(range(24))] == drawn[5][::-1]
    for i in range(24):
        assert {epoch[i] for epoch in drawn} == set(images[i].captions)  # 1 of 2,000 seeds would leave one out
    other = CaptionedImages(images, captioned_folder, processor, seed=4)
    assert [other[0, i]["caption"] for i in range(24)] != drawn[0]


def test_every_caption_in_order_with_its_image(captioned_folder, processor):
    images = read_annotations(captioned_folder / "captions.txt")
    one, every = (CaptionedImages(images, captioned_folder, processor, every_caption=x) for x in (False, True))
    assert len(one) == 24 and len(every) == one.num_captions == 48
    items = [every[k] for k in range(48)]
    assert [item["caption"] for item in items] == [text for image in images.values() for text in image.captions]
    assert [item["caption_id"] for item in items] == list(range(48))
    for k, item in enumerate(items):
        assert (item["pixel_values"] == one[k // 2]["pixel_values"]).all()
    drawn = one[7, 11]
    assert items[drawn["caption_id"]]["caption"] == drawn["caption"]


def test_same_images_are_held_out_in_every_run(captioned_folder):
    images = read_annotations(captioned_folder / "captions.txt")
    rest, held_out = hold_out(images, 5)
    assert len(held_out) == 5 and not rest.keys() & held_out.keys() and rest.keys() | held_out.keys() == images.keys()
    assert hold_out(images, 5)[1] == held_out and hold_out(images, 0) == (images, {})


def test_karpathys_file_brings_its_validation_images(captioned_folder, vit_folder, processor, tmp_path):
    splits = ["train"] * 10 + ["restval"] * 6 + ["val"] * 5 + ["test"] * 3
    entries = [
        {"split": split, "imgid": i, "filename": f"{i}.png", "sentences": [{"raw": f"caption {i}"}]}
        for i, split in enumerate(splits)
    ]
    (tmp_path / "dataset.json").write_text(json.dumps({"dataset": "flickr8k", "images": entries}))
    values = {"model": str(vit_folder), "data": str(captioned_folder), "captions": str(tmp_path / "dataset.json")}
    train, validation = load_captioned_images(TrainArguments(**values, split="train+restval"), processor)
    assert len(train) == 16 and sorted(validation.images.ids) == list(range(16, 21))
    few = TrainArguments(**values, validation_split="test", validation_size=2)
    assert set(load_captioned_images(few, processor)[1].images.ids) < {21, 22, 23}


def test_validation_captions_have_images_of_their_own(captioned_folder, vit_folder, processor, tmp_path):
    Path(tmp_path, "own.csv").write_text("image,caption\n3.png,other words\n")
    Path(tmp_path, "3.png").write_bytes((captioned_folder / "3.png").read_bytes())
    captions = str(captioned_folder / "captions.txt")
    values = {"model": str(vit_folder), "data": str(captioned_folder), "captions": captions}
    own = {"validation_data": str(tmp_path), "validation_captions": str(tmp_path / "own.csv")}
    train, validation = load_captioned_images(TrainArguments(**values, **own), processor)
    assert len(train) == 24 and [item["caption"] for item in (validation[0],)] == ["other words"]
