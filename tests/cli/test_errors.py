"""What goes wrong on the command line is one line that names it."""

from __future__ import annotations

from typing import Any

import pytest
from huggingface_hub import constants
from PIL import Image
from typer.testing import CliRunner

from dtem_hf import DTPSConfig
from dtem_hf.cli import app
from tests.support.command_line import run


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
            (("--r", "3", "--flops", "0.5"), ("r, flops=('3', 0.5): only one of them",)),
            (("--flops", "2"), ("flops=2.0",)),
            (("--image-size", "4"), ("image_size=4",)),
        ],
    )
    def test_bad_value(self, config_folder, arguments, words):
        self.check(run("plan", config_folder, *arguments), 2, *words)

    def test_model_that_cannot_be_merged(self, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "bert"}')

        self.check(run("plan", tmp_path), 2, "'bert' cannot be merged: ")

    def test_an_adapter_is_no_model(self, adapter_folder):
        self.check(run("plan", adapter_folder), 2, "adapter is a merge adapter and no model: name its backbone")

    def test_a_file_is_no_model(self, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "vit"}')
        Image.new("RGB", (32, 32)).save(tmp_path / "cat.png")
        self.check(
            run("visualize", tmp_path / "config.json", tmp_path / "cat.png"), 2, "config.json", "this is a file"
        )

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

    def test_a_picture_is_not_drawn_over_itself(self, model_folder, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Image.new("RGB", (32, 32)).save("cat.png")
        before = (tmp_path / "cat.png").read_bytes()
        shown = run("visualize", model_folder, "cat.png", "--method", "tome", "--output", tmp_path / "cat.png")
        self.check(shown, 2, "output=", "another file than the pictures")
        assert (tmp_path / "cat.png").read_bytes() == before

    @pytest.mark.parametrize(("no_color", "is_red"), [("", True), ("1", False)])
    def test_no_color_is_heeded(self, config_folder, monkeypatch, no_color, is_red):
        monkeypatch.setenv("NO_COLOR", no_color)
        shown = CliRunner().invoke(app, ["plan", str(config_folder), "--r", "-1"], color=True)
        assert "Error: r=-1" in shown.stderr and ("\x1b[31m" in shown.stderr) == is_red

    def test_traceback_on_request(self, config_folder):
        assert isinstance(run("--traceback", "plan", config_folder, "--r", "-1").exception, ValueError)
