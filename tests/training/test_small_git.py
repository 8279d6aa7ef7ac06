"""The small GIT: what it reads, what it saves, and that it learns captions."""

import json

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer, GitForCausalLM

from dtem_hf import BadValue
from dtem_hf.data.captioned_images import hold_out
from dtem_hf.data.captions import read_annotations
from dtem_hf.opening import load_processor
from dtem_hf.training.small_git import SmallGitArguments, main, make_tokenizer, train_small_git


COLOURS = {"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220)}


@pytest.fixture
def coloured(tmp_path):
    """Plain images in one of three colours, two captions each."""
    lines = ["image,caption"]
    (tmp_path / "images").mkdir()
    for i in range(12):
        name = list(COLOURS)[i % 3]
        pixels = np.full((20, 24, 3), COLOURS[name], dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
        lines += [f"{i}.png,A {name} picture .", f'{i}.png,"It is {name}, all {name}"']
    (tmp_path / "captions.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_it_learns_to_say_which_colour_it_sees(coloured, capsys):
    options = {"images": coloured / "images", "captions": coloured / "captions.txt", "output_dir": coloured / "git"}
    sizes = {"steps": 240, "batch_size": 12, "image_size": 16, "patch_size": 8, "hidden_size": 32}
    main([f"--{name}={value}" for name, value in {**options, **sizes, "vision_layers": 1, "text_layers": 1}.items()])
    record = json.loads((coloured / "git" / "training.json").read_text())
    assert record["last_loss"] < 0.5 < record["first_loss"] and record["num_captions"] == 24
    model = GitForCausalLM.from_pretrained(coloured / "git")
    tokenizer, processor = AutoTokenizer.from_pretrained(coloured / "git"), load_processor(str(coloured / "git"))
    for name, colour in COLOURS.items():
        picture = Image.new("RGB", (30, 30), colour)
        tokens = model.generate(**processor(images=picture, return_tensors="pt"), max_new_tokens=12)
        assert name in tokenizer.decode(tokens[0], skip_special_tokens=True)
    assert "loss" in capsys.readouterr().out


def test_tokenizer_gives_captions_back():
    texts = ["A man rides a red bicycle.", "Two dogs, one brown, run."]
    tokenizer = make_tokenizer(texts, 200)
    ids = tokenizer(texts[1])["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == "two dogs, one brown, run."


def test_images_that_are_held_out_are_those_of_training(coloured):
    """Neither of the two sees what validation will see, its captions' words among them."""
    lines = (coloured / "captions.txt").read_text().splitlines()
    (coloured / "captions.txt").write_text("\n".join([*lines, *(f"{i}.png,word{i}" for i in range(12))]) + "\n")
    options = {"image_size": 16, "patch_size": 8, "hidden_size": 8, "vision_layers": 1, "text_layers": 1, "steps": 1}
    files = {"images": str(coloured / "images"), "captions": str(coloured / "captions.txt")}
    record = train_small_git(SmallGitArguments(**files, **options, validation_size=4, output_dir=str(coloured / "g")))
    assert record["num_images"] == 8 and record["num_captions"] == 24
    with pytest.raises(BadValue, match="validation_size=12: fewer than the captioned images"):
        train_small_git(SmallGitArguments(**files, validation_size=12))
    _, held_out = hold_out(read_annotations(files["captions"]), 4)
    pieces = AutoTokenizer.from_pretrained(coloured / "g").get_vocab()
    for i in range(12):
        assert (f"word{i}" in pieces) == (i not in held_out)


def test_bad_options_are_named():
    for change, message in (
        ({"patch_size": 7}, "patch_size=7: a divisor of image_size 96"),
        ({"hidden_size": 30}, "hidden_size=30"),
        ({"steps": 0}, "steps=0"),
    ):
        with pytest.raises(BadValue, match=message):
            SmallGitArguments(images="i", captions="c", **change)
