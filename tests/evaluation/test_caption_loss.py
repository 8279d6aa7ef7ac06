"""The loss of given captions by method: against the stock model caption by caption, and DTEM against ToMe."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, GitForCausalLM

from dtem_hf import BadValue, DTEMConfig, MergeAdapter, attach
from dtem_hf.data.captioned_images import hold_out
from dtem_hf.data.captions import read_annotations
from dtem_hf.evaluation.caption_loss import CaptionLossArguments, main, standard_error
from dtem_hf.opening import load_processor
from dtem_hf.training.small_git import SmallGitArguments, train_small_git


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight images of noise with two captions each, and a GIT that has seen one batch of them."""
    folder, draw = tmp_path_factory.mktemp("captions"), np.random.default_rng(0)
    lines = ["image,caption"]
    for i in range(8):
        Image.fromarray(draw.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        lines += [f"{i}.png,picture number {i}", f"{i}.png,this is the picture {i} of eight"]
    (folder / "captions.txt").write_text("\n".join(lines) + "\n")
    sizes = {"image_size": 24, "patch_size": 6, "hidden_size": 32, "vision_layers": 2, "text_layers": 1}
    files = {"images": str(folder), "captions": str(folder / "captions.txt"), "output_dir": str(folder / "git")}
    train_small_git(SmallGitArguments(**files, **sizes, steps=1, batch_size=4))
    return folder


def run(folder, *options):
    files = {"model": folder / "git", "images": folder, "captions": folder / "captions.txt"}
    listed = [part for name, value in files.items() for part in (f"--{name}", str(value))]
    main([*listed, "--hold_out", "3", "--output", str(folder / "loss.json"), "--batch_size", "4", *options])
    return json.loads((folder / "loss.json").read_text())


def test_unmerged_loss_is_the_stock_models_caption_by_caption(folder):
    result = run(folder, "--r", "3")
    model = GitForCausalLM.from_pretrained(folder / "git").eval()
    tokenizer, processor = AutoTokenizer.from_pretrained(folder / "git"), load_processor(str(folder / "git"))
    _, held_out = hold_out(read_annotations(folder / "captions.txt"), 3)
    losses = []
    for image in held_out.values():
        pixels = processor(Image.open(folder / image.file_name), return_tensors="pt").pixel_values
        for caption in image.captions:
            ids = tokenizer(caption, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                losses.append(model(pixel_values=pixels, input_ids=ids, labels=ids).loss.item())
    assert result["data"]["num_images"] == 3 and result["data"]["num_captions"] == len(losses) == 6
    plain = result["rows"][0]
    assert plain["loss"] == pytest.approx(sum(losses) / 6, rel=1e-5) and plain["loss_ratio"] == 1
    assert [row["visual_tokens"] for row in result["rows"]] == [17, 11, 11]


def test_untrained_dtem_is_tome_and_a_trained_one_is_not(folder, capsys):
    untrained = run(folder, "--r", "3", "5")
    assert [each["r"] for each in untrained["comparisons"]] == [3, 5]
    for each in untrained["comparisons"]:
        assert each["dtem_minus_tome"] == pytest.approx(0, abs=1e-6)
    model = attach(GitForCausalLM.from_pretrained(folder / "git"), DTEMConfig(r=3, init="random"))
    model.save_merge_adapter(folder / "adapter")
    assert MergeAdapter.from_pretrained(folder / "adapter").backbone.num_layers == 2
    trained = run(folder, "--r", "3", "5", "--adapter", str(folder / "adapter"))
    rows = {(row["method"], row["r"]): row["loss"] for row in trained["rows"]}
    for each in trained["comparisons"]:
        expected = rows["dtem", each["r"]] - rows["tome", each["r"]]
        assert each["dtem_minus_tome"] == pytest.approx(expected, abs=1e-9) and expected != 0
    assert "DTEM − ToMe" in capsys.readouterr().out


def test_standard_error_by_hand():
    values = torch.tensor([1.0, 3.0, torch.nan, 8.0])
    mean = 4.0
    deviation = (((1 - mean) ** 2 + (3 - mean) ** 2 + (8 - mean) ** 2) / 2) ** 0.5
    assert standard_error(values) == pytest.approx(deviation / 3**0.5)


@pytest.mark.parametrize("change", [{"batch_size": 0}, {"hold_out": 0}])
def test_bad_options_are_named(change):
    with pytest.raises(BadValue, match=f"{next(iter(change))}=0: 1 or more"):
        CaptionLossArguments(model="m", images="i", captions="c", **change)
