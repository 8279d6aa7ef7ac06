"""Every program in examples/ runs as a user runs it, on small models with random weights."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image

from dtem_hf import AutoModelForImageTextToText, AutoProcessor, DTEMConfig, MergeAdapter, attach
from tests.models.test_processor import saved_processor, word_tokenizer
from tests.support.containers import TEXT, VIT, built, llava


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SIZE = {"height": 32, "width": 32}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a program with arguments, and returns what it prints."""

    def run_example(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run_example


@pytest.fixture
def adapter(vit_folder: Path, tmp_path: Path) -> Path:
    model = attach(tf.ViTForImageClassification.from_pretrained(vit_folder), DTEMConfig(r=2))
    model.save_merge_adapter(tmp_path / "adapter", base_model="user/tiny")
    return tmp_path / "adapter"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    for name in ("a.png", "b.jpg", "c.png"):
        Image.fromarray(draw.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(folder / name)
    return folder


def test_every_example_is_run_here() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    assert all(f'"{path.stem}"' in source or f'"{path.name}"' in source for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short_and_opens_with_its_commands(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert 40 <= len(lines) <= 80
    assert any(line.strip().startswith(f"python examples/{path.name} ") for line in lines[:8])


@pytest.mark.parametrize("with_adapter", [False, True])
def test_classify_folder(run: Any, vit_folder: Path, image_folder: Path, adapter: Path, with_adapter: bool) -> None:
    merge = ("--merge", adapter) if with_adapter else ()
    printed = run("classify_folder", image_folder, "--model", vit_folder, "--r", 3, "--batch_size", 20, *merge)
    named = dict(re.findall(r"^(\S+\.png)\t(LABEL_\d)\t", printed, re.MULTILINE))
    assert len(named) == 48
    processor = tf.AutoImageProcessor.from_pretrained(vit_folder)
    model = attach(tf.ViTForImageClassification.from_pretrained(vit_folder), str(adapter))
    model.set_reduction(3)  # an untrained embedding merges as ToMe
    pixels = processor([Image.open(image_folder / name) for name in named], return_tensors="pt")
    with torch.inference_mode():
        merged = model(**pixels).logits.argmax(-1)
        with model.unmerged():
            plain = model(**pixels).logits.argmax(-1)
    assert list(named.values()) == [model.config.id2label[int(index)] for index in merged]
    assert f"same class as the plain model: {int((merged == plain).sum())} of 48" in printed


def test_clip_search(run: Any, pictures: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    text = {**TEXT, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = tf.CLIPConfig(text_config=text, vision_config=VIT, projection_dim=16, initializer_factor=3.0)
    tf.CLIPModel(config).save_pretrained(tmp_path)
    tf.CLIPProcessor(tf.CLIPImageProcessor(size=SIZE, crop_size=SIZE), word_tokenizer()).save_pretrained(tmp_path)
    asked = ("--labels", "what is this", "and that", "--query", "this and that")
    printed = run("clip_search", pictures, "--model", tmp_path, "--r", 5, *asked)
    assert dict(re.findall(r"^(\S+)\t(what is this|and that)$", printed, re.MULTILINE)).keys() == {
        "a.png",
        "b.jpg",
        "c.png",
    }
    scores = [float(score) for score in re.findall(r"^(-?[\d.]+)\t\S+$", printed, re.MULTILINE)]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True)
    assert float(re.findall(r"plain embeddings: ([\d.]+)", printed)[0]) < 1
    assert "embeddings: 1.0000 " in run("clip_search", pictures, "--model", tmp_path, "--r", 0, *asked)


def test_dinov2_features(run: Any, pictures: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = tf.Dinov2Config(**{**VIT, "mlp_ratio": 2}, initializer_range=0.2)
    tf.Dinov2Model(config).save_pretrained(tmp_path)
    tf.BitImageProcessor(size=SIZE, crop_size=SIZE).save_pretrained(tmp_path)
    asked = (pictures / "a.png", "--model", tmp_path, "--output", tmp_path / "features.png")
    assert "plain features: 1.0000" in run("dinov2_features", *asked, "--r", 0)
    with Image.open(tmp_path / "features.png") as sheet:
        plain, merged = (np.asarray(sheet.crop((left, 0, left + 128, 128))) for left in (128, 256))
    assert plain.any() and (plain == merged).all()
    assert "plain features: 1.0000" not in run("dinov2_features", *asked, "--r", 8)


@pytest.mark.parametrize("name", ["train_with_trainer", "train_plain_loop"])
def test_training(run: Any, vit_folder: Path, image_folder: Path, tmp_path: Path, name: str) -> None:
    options = ("--r", 3, "--steps", 3, "--batch_size", 8, "--output", tmp_path / "out")
    printed = run(name, image_folder, "--model", vit_folder, *options)
    start = attach(tf.ViTForImageClassification.from_pretrained(vit_folder), DTEMConfig(r=3)).to_merge_adapter()
    learned = MergeAdapter.from_reference(tmp_path / "out")
    assert learned.config.r == 3 and f'merge="{tmp_path / "out"}"' in printed
    assert not torch.equal(learned.tensors["layers.0.weight"], start.tensors["layers.0.weight"])


def test_git_captions(run: Any, pictures: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = tf.GitConfig(
        vision_config={**VIT, "initializer_range": 0.3},
        **{**TEXT, "vocab_size": 11, "initializer_range": 0.3},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    tf.GitForCausalLM(config).save_pretrained(tmp_path)
    images = tf.CLIPImageProcessor(size=SIZE, crop_size=SIZE)
    tf.GitProcessor(images, word_tokenizer()).save_pretrained(tmp_path)
    asked = ("--model", tmp_path, "--max_new_tokens", 4)
    printed = run("git_captions", pictures / "a.png", pictures / "b.jpg", *asked, "--r", 9)
    assert f"reads {65 - 4 * 9} visual tokens of an image instead of 65" in printed
    assert re.findall(r"^(\w\.\w+)\n  merged:.*\n  plain:", printed, re.MULTILINE) == ["a.png", "b.jpg"]
    same = re.findall(r"merged: (.*)\n  plain:  (.*)", run("git_captions", pictures / "a.png", *asked, "--r", 0))
    assert same and same[0][0] == same[0][1]


def test_llava_merged_tokens(run: Any, pictures: Path, tmp_path: Path) -> None:
    model, _ = built(llava)
    model.save_pretrained(tmp_path)
    saved_processor(tmp_path, "llava")
    asked = (pictures / "a.png", "what is this", "--model", tmp_path, "--r", 5, "--max_new_tokens", 3)
    lengths = [int(count) for count in re.findall(r"a prompt of (\d+) tokens", run("llava_merged_tokens", *asked))]
    # LLaVA reads the output of the last layer but one: three of four layers merge before.
    assert len(lengths) == 2 and lengths[1] - lengths[0] == 3 * 5


def test_train_llava(run: Any, pictures: Path, tmp_path: Path) -> None:
    """The language model's loss falls; with the adapter, the whole model hands on merged tokens."""
    model, _ = built(llava)
    for parameter in model.model.language_model.parameters():  # so that it looks at the image
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "llava")
    saved_processor(tmp_path / "llava", "llava")
    answers = ["image,question,answer", "a.png,what is,this and that", "b.jpg,what is,that", "c.png,what is,is this"]
    (pictures / "answers.csv").write_text("\n".join(answers) + "\n")
    options = ("--r", 15, "--steps", 16, "--batch_size", 3, "--lr", 0.001, "--output", tmp_path / "out")
    printed = run(
        "train_llava", pictures / "answers.csv", "--model", tmp_path / "llava", "--dtype", "float32", *options
    )
    losses = [float(loss) for loss in re.findall(r"'loss': '?([\d.]+)", printed)]
    assert len(losses) == 16 and sum(losses[-4:]) < sum(losses[:4]) - 0.02
    learned = MergeAdapter.from_reference(tmp_path / "out")
    start = attach(model, DTEMConfig(r=15, unmerge=False)).to_merge_adapter()
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "llava", merge=str(tmp_path / "out")).eval()
    for name, tensor in merged.to_merge_adapter().tensors.items():
        assert torch.equal(tensor, learned.tensors[name])
    assert not torch.equal(learned.tensors["layers.0.weight"], start.tensors["layers.0.weight"])
    processor = AutoProcessor.from_pretrained(tmp_path / "llava", merge=merged)
    inputs = processor(images=Image.open(pictures / "a.png"), text="<image> what is this", return_tensors="pt")
    assert (inputs["input_ids"] == 5).sum() == 64 - 3 * 15
    assert merged.generate(**inputs, max_new_tokens=3, min_new_tokens=3).shape[1] == inputs["input_ids"].shape[1] + 3


def test_publish_adapter_only_shows(run: Any, adapter: Path) -> None:
    printed = run("publish_adapter", adapter, "me/a")
    assert re.search(r"bytes  merge_adapter\.safetensors$", printed, re.MULTILINE)
    assert "Nothing was published" in printed and "hold no results" in printed


def test_publish_adapter(hub: Any, client: Any, adapter: Path) -> None:
    program = (str(EXAMPLES / "publish_adapter.py"), str(adapter), "me/a", "--push")
    assert "read back: the same tensors" in client("tests.support.hub_client:run_program", *program, token="hf_me")
    assert hub.repos["me/a"].private and "merge_adapter.safetensors" in hub.files("me/a")
