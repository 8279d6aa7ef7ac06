"""The command line: what it prints is counted by hand."""

from __future__ import annotations

import sys
from copy import deepcopy
from pathlib import Path

import pytest
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

from dtem_hf import ToMeConfig, __version__, attach
from tests.support.children import run_python
from tests.support.command_line import TINY, run, run_json


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
        assert result.exit_code == 1 and "holds a plain model and no adapter" in result.stderr

    def test_a_merged_model_publishes_itself(self, tmp_path):
        attach(ViTForImageClassification(deepcopy(TINY)), ToMeConfig(r=2)).save_pretrained(tmp_path)

        result = run("push", tmp_path, "user/tiny", "--dry-run")

        assert result.exit_code == 1 and "its own save_pretrained or push_to_hub" in result.stderr


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
