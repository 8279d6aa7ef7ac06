"""The command line: what it prints is counted by hand, and what goes wrong is one line."""

from __future__ import annotations

import json
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil
from typer.testing import CliRunner

from dtem_hf import DTEMConfig, DTPSConfig, MergeAdapter, ToMeConfig, __version__, attach
from dtem_hf.cli import app
from dtem_hf.hub.facts import BackboneFacts
from tests.support.children import run_python


# 4 × 4 patches of 8 × 8 pixels and CLS: 17 tokens; width 16, two heads, an MLP of 32, five classes.
TINY = ViTConfig(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    image_size=32,
    patch_size=8,
    num_labels=5,
)


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run_json(*arguments: Any) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def config_folder(tmp_path: Path) -> Path:
    """A model's config, and no weights."""
    TINY.save_pretrained(tmp_path / "config")
    return tmp_path / "config"


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A whole checkpoint, with its image processor."""
    ViTForImageClassification(TINY).save_pretrained(tmp_path / "model")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def adapter_folder(tmp_path: Path) -> Path:
    """An adapter of width 4 for a backbone of 2 layers of width 16."""
    tensors = {f"layers.{i}.weight": torch.ones(4, 16) for i in range(2)}
    tensors |= {f"layers.{i}.bias": torch.zeros(4) for i in range(2)}
    backbone = BackboneFacts("vit", num_layers=2, hidden_size=16, base_model="user/tiny")
    MergeAdapter(DTEMConfig(r=3, init="random", embed_dim=4), tensors, backbone).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


CARD = """---
library_name: dtem-hf
model-index:
- name: tiny
  results:
  - task: {type: image-classification}
    dataset: {type: digits, name: Digits, split: test}
    metrics:
    - {type: accuracy, value: 91.5, name: top-1}
---
"""


class TestPlan:
    def test_counts_tokens_and_multiply_adds(self, config_folder):
        plan = run_json("plan", config_folder, "--method", "tome", "--r", 3)

        assert plan["merge"]["method"] == "tome"
        assert plan["num_tokens"] == 17
        assert plan["reductions"] == [3, 3]
        assert plan["tokens"] == [14, 11]
        # Queries, keys, values and output 4·16², scores and values 2·16 per pair, MLP 2·16·32 on what is left, and the
        # similarities of 8 with 8 tokens of width 8; their keys are there already.
        first = 17 * 1024 + 17**2 * 32 + 14 * 1024 + 8 * 8 * 8
        second = 14 * 1024 + 14**2 * 32 + 11 * 1024 + 6 * 7 * 8
        assert plan["layer_multiply_adds"] == [first, second]
        # 16 patches of 3·8·8 numbers to 16, and the five classes.
        around = 16 * 192 * 16 + 16 * 5
        assert plan["multiply_adds"] == first + second + around
        assert plan["unmerged_multiply_adds"] == 2 * (17 * 1024 + 17**2 * 32 + 17 * 1024) + around

    def test_prints_a_table(self, config_folder):
        result = run("plan", config_folder, "--r", 3)

        assert result.exit_code == 0
        rows = [line.split() for line in result.stdout.splitlines()]
        assert ["0", "17", "3", "14"] in [row[:4] for row in rows]
        assert ["1", "14", "3", "11"] in [row[:4] for row in rows]
        assert "ViTForImageClassification" in result.stdout
        assert result.stdout.splitlines()[-1].startswith("17 -> 11 tokens;")

    def test_method_defaults_to_dtem_and_says_so(self, config_folder):
        plan = run_json("plan", config_folder)

        assert (plan["merge"]["method"], plan["merge"]["r"]) == ("dtem", 16)
        assert "dtem, r=16: the default; --method and --r choose" in run("plan", config_folder).stdout
        assert ": the default" not in run("plan", config_folder, "--method", "tome", "--r", "2").stdout
        assert "tome, r=2" in run("plan", config_folder, "--method", "tome", "--r", "2").stdout

    def test_warnings_are_one_line(self, config_folder):
        result = run("plan", config_folder, "--r", 200)

        assert result.exit_code == 0
        assert result.stderr.startswith("Note: r=200: an image of the model's own size has 16 patches")
        assert len(result.stderr.splitlines()) == 1

    def test_takes_one_r_per_layer_and_an_image_size(self, config_folder):
        plan = run_json("plan", config_folder, "--r", "[0, 20]", "--image-size", 64)

        assert plan["num_tokens"] == 65
        assert plan["tokens"] == [65, 45]

    def test_solves_for_a_share_of_the_multiply_adds(self, config_folder):
        plan = run_json("plan", config_folder, "--flops", 0.9)

        assert plan["multiply_adds"] <= 0.9 * plan["unmerged_multiply_adds"]
        assert plan["tokens"][-1] < 17

    def test_takes_the_class_and_the_merge_that_a_checkpoint_was_saved_with(self, tmp_path):
        attach(ViTForImageClassification(deepcopy(TINY)), ToMeConfig(r=2)).save_pretrained(tmp_path)

        plan = run_json("plan", tmp_path)

        assert plan["merge"]["method"] == "tome"
        assert plan["tokens"] == [15, 13]

    def test_takes_the_bare_encoder_where_it_was_saved(self, tmp_path):
        ViTConfig(**{**TINY.to_dict(), "architectures": ["ViTModel"]}).save_pretrained(tmp_path)

        assert "(ViTModel)" in run("plan", tmp_path, "--r", 3).stdout


class TestInfo:
    def test_shows_what_an_adapter_holds(self, adapter_folder):
        info = run_json("info", adapter_folder)

        assert (info["merge"]["method"], info["merge"]["r"], info["merge"]["embed_dim"]) == ("dtem", 3, 4)
        assert info["backbone"] == {
            "model_type": "vit",
            "num_layers": 2,
            "hidden_size": 16,
            "base_model": "user/tiny",
            "base_revision": None,
        }
        assert info["parameters"] == 2 * (4 * 16 + 4)
        assert info["size_bytes"] == 4 * 2 * (4 * 16 + 4)
        assert info["results"] == []

    def test_shows_the_results_in_its_card(self, adapter_folder):
        (adapter_folder / "README.md").write_text(CARD)

        result = run("info", adapter_folder)

        assert "user/tiny" in result.stdout
        assert "Digits, top-1" in result.stdout
        assert "91.5" in result.stdout
        assert run_json("info", adapter_folder)["results"] == [
            {"task": "image-classification", "dataset": "Digits", "split": "test", "metric": "top-1", "value": 91.5}
        ]

    @pytest.mark.parametrize("card", ["---\n[\n---\n", "---\n- a list\n---\n", "no metadata", None])
    def test_does_without_a_sound_card(self, adapter_folder, card):
        (adapter_folder / "README.md").unlink()
        if card is not None:
            (adapter_folder / "README.md").write_text(card)

        assert run_json("info", adapter_folder)["results"] == []

    def test_of_a_merged_model_shows_how_it_is_merged(self, tmp_path):
        attach(ViTForImageClassification(deepcopy(TINY)), ToMeConfig(r=2)).save_pretrained(tmp_path)

        result = run("info", tmp_path)

        assert result.exit_code == 0, result.output
        assert "a merged model (ViTForImageClassification)" in result.stdout and "tome" in result.stdout
        assert result.stdout.splitlines()[-1].startswith("17 -> 13 tokens;")
        found = run_json("info", tmp_path)
        assert (found["merge"]["method"], found["merge"]["r"], found["plan"]["tokens"]) == ("tome", 2, [15, 13])


class TestPush:
    def test_a_dry_run_names_the_repository_and_the_files(self, adapter_folder):
        result = run("push", adapter_folder, "user/tiny-adapter", "--dry-run", "--branch", "next")

        assert result.exit_code == 0, result.output
        assert (
            "Nothing is sent. To be published: https://huggingface.co/user/tiny-adapter, branch next" in result.stdout
        )
        assert "merge_adapter.safetensors" in result.stdout

    def test_a_dry_run_without_a_repository_says_so(self, adapter_folder):
        assert "no repository is named" in run("push", adapter_folder, "--dry-run").stdout
        result = run("push", adapter_folder)
        assert result.exit_code == 2 and "repo_id=None: USER/REPO" in result.stderr

    @pytest.mark.parametrize("command", ["push", "info"])
    def test_a_plain_model_is_no_adapter(self, model_folder, command):
        result = run(command, model_folder, *(["a/b", "--dry-run"] if command == "push" else []))
        assert result.exit_code == 1 and "holds a model that is not merged, and no adapter" in result.stderr

    def test_a_merged_model_publishes_itself(self, tmp_path):
        attach(ViTForImageClassification(deepcopy(TINY)), ToMeConfig(r=2)).save_pretrained(tmp_path)

        result = run("push", tmp_path, "user/tiny", "--dry-run")

        assert result.exit_code == 1 and "its own save_pretrained and push_to_hub" in result.stderr


class TestVisualize:
    @pytest.fixture
    def picture(self, tmp_path: Path) -> Path:
        Image.linear_gradient("L").save(tmp_path / "gradient.png")
        return tmp_path / "gradient.png"

    def test_draws_a_method(self, model_folder, picture, tmp_path):
        result = run("visualize", model_folder, picture, "--method", "tome", "--r", 3, "--output", tmp_path / "a.png")

        assert result.exit_code == 0, result.output
        assert Image.open(tmp_path / "a.png").width > 0

    def test_draws_a_column_for_every_adapter_and_config(self, model_folder, adapter_folder, picture, tmp_path):
        ToMeConfig(r=3).save_pretrained(tmp_path / "tome")
        one = ("--merge", adapter_folder)
        two = (*one, "--merge", tmp_path / "tome" / "merge_config.json")

        for name, merges in (("one.png", one), ("two.png", two)):
            result = run("visualize", model_folder, picture, *merges, "--output", tmp_path / name)
            assert result.exit_code == 0, result.output

        assert Image.open(tmp_path / "two.png").width > Image.open(tmp_path / "one.png").width

    def test_draws_one_image_layer_by_layer(self, model_folder, adapter_folder, picture, tmp_path):
        arguments = ["visualize", model_folder, picture, "--merge", adapter_folder, "--by-layer"]

        result = run(*arguments, "--output", tmp_path / "layers.png")

        assert result.exit_code == 0, result.output
        assert Image.open(tmp_path / "layers.png").width > 0
        two = run(*arguments[:3], picture, "--by-layer")
        assert two.exit_code == 2 and "by_layer=True: one image, not 2" in two.stderr


class TestErrors:
    """One line on stderr and nothing on stdout; 2 for a bad value, 1 for what is not there."""

    def check(self, result: Any, exit_code: int, *words: str) -> None:
        assert result.exit_code == exit_code
        assert result.stdout == ""
        assert len(result.stderr.splitlines()) == 1
        for word in words:
            assert word in result.stderr

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (("--method", "nothing"), ("method", "'nothing'", "dtem, dtps, etps, evit, pitome, tofu, tome")),
            (("--r", "-1"), ("r=-1", "from 0")),
            (("--r", "many"), ("r='many'",)),
            (("--r", "null"), ("r='null'", "a whole number")),
            (("--r", "[3]"), ("1 layers", "the model has 2")),
            (("--r", "3", "--flops", "0.5"), ("r, flops=('3', 0.5): one of them",)),
            (("--flops", "2"), ("flops=2.0",)),
            (("--image-size", "4"), ("image_size=4",)),
        ],
    )
    def test_bad_value(self, config_folder, arguments, words):
        self.check(run("plan", config_folder, *arguments), 2, *words)

    def test_model_that_cannot_be_merged(self, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "bert"}')

        self.check(run("plan", tmp_path), 2, "'bert' cannot be merged: ")

    def test_config_without_a_model_type(self, tmp_path):
        (tmp_path / "config.json").write_text("{}")

        self.check(run("plan", tmp_path), 2, "model_type")

    def test_no_such_model(self, tmp_path):
        self.check(run("plan", tmp_path / "nothing"), 1, f"there is no folder {tmp_path / 'nothing'}")

    def test_no_such_model_by_a_name_without_a_folder(self, tmp_path, monkeypatch):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        Image.new("RGB", (32, 32)).save(tmp_path / "cat.png")
        for command in (["plan"], ["info"], ["visualize", tmp_path / "cat.png"]):
            shown = run(command[0], "nowhere", *command[1:])
            self.check(shown, 1, "there is no folder nowhere here, and on the Hub")

    def test_a_folder_is_no_picture(self, model_folder, tmp_path):
        self.check(run("visualize", model_folder, "x.png", "--output", tmp_path), 2, "output=", "this is a folder")

    def test_an_untrained_method_is_not_drawn(self, model_folder, tmp_path):
        picture = tmp_path / "cat.png"
        Image.new("RGB", (32, 32)).save(picture)
        for options, field in (
            (("--method", "dtps"), "method"),
            (("--merge", tmp_path / "merge_config.json"), "merge"),
        ):
            DTPSConfig().save_pretrained(tmp_path)
            self.check(run("visualize", model_folder, picture, *options), 2, f"{field}='dtps': a method that needs no")

    def test_no_such_adapter(self, tmp_path):
        self.check(run("info", tmp_path), 1, "merge_config.json")

    def test_damaged_adapter(self, adapter_folder):
        (adapter_folder / "merge_adapter.safetensors").write_bytes(b"nothing")

        self.check(run("info", adapter_folder), 2, "merge_adapter.safetensors")

    def test_no_such_picture(self, model_folder, tmp_path):
        self.check(run("visualize", model_folder, tmp_path / "cat.jpg"), 1, "cat.jpg")

    def test_merge_beside_method(self, model_folder, tmp_path):
        self.check(run("visualize", model_folder, "x.png", "--merge", "a/b", "--method", "tome"), 2, "method='tome'")

    def test_traceback_on_request(self, config_folder):
        assert isinstance(run("--traceback", "plan", config_folder, "--r", "-1").exception, ValueError)


@pytest.mark.parametrize(
    ("command", "target"),
    [
        ("train", "dtem_hf.training.program.main"),
        ("evaluate", "dtem_hf.evaluation.classification.main"),
        ("benchmark", "dtem_hf.benchmark.program.main"),
        ("advise", "dtem_hf.benchmark.advise.main"),
        ("export", "dtem_hf.deploy.program.main"),
        ("quickstart", "dtem_hf.quickstart.main"),
    ],
)
@pytest.mark.parametrize("arguments", [["--help"], ["--r", "16", "8", "-x", "file", "--flag=1"], []])
def test_programs_get_their_arguments_as_they_are(monkeypatch, command, target, arguments):
    seen: list[list[str]] = []
    monkeypatch.setattr(target, seen.append)
    monkeypatch.setattr(sys, "argv", ["pytest"])

    assert run(command, *arguments).exit_code == 0
    assert seen == [arguments]


@pytest.mark.parametrize("command", ["plan", "info", "push", "visualize"])
def test_help_has_an_example(command):
    result = run(command, "--help")

    assert result.exit_code == 0
    assert f"dtem-hf {command} " in result.stdout.split("Examples:")[1]


def test_runs_as_a_module():
    assert run_python(["-m", "dtem_hf", "--version"], check=True).stdout.strip() == __version__
