"""Command lines and YAML files make the same arguments; what is wrong is named."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from dtem_hf import BadValue
from dtem_hf.programs.arguments import option, parse_arguments, parse_reduction, run_script


@dataclass(kw_only=True)
class Options:
    """For the test."""

    name: str = option("a name")
    size: int = option("a size", default=3)
    rates: list[float] = option("some rates", default_factory=list)
    fast: bool = option("a switch", default=False)
    limit: int | None = option("perhaps", default=None)


def test_yaml_is_overridden_by_the_command_line(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("name: yaml\nsize: 5\nrates: [0.1, 0.2]\nfast: true\nlimit: null\n")
    read = parse_arguments(Options, ["--config", str(config), "--size", "7"], "")
    assert read == Options(name="yaml", size=7, rates=[0.1, 0.2], fast=True, limit=None)


def test_leading_options_need_no_name():
    read = parse_arguments(Options, ["x", "--size", "7"], "", leading=("name", "limit"))
    assert read == Options(name="x", size=7)
    assert parse_arguments(Options, ["x", "4"], "", leading=("name", "limit")) == Options(name="x", limit=4)
    assert parse_arguments(Options, ["--size=2", "--name=y"], "", leading=("name",)) == Options(name="y", size=2)
    with pytest.raises(SystemExit):
        parse_arguments(Options, ["x", "y"], "", leading=("name",))


def test_unknown_key_and_missing_file_are_named(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("name: x\nsizze: 5\n")
    with pytest.raises(BadValue, match=r"sizze.*known: \['fast', 'limit', 'name', 'rates', 'size'\]"):
        parse_arguments(Options, ["--config", str(config)], "")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        parse_arguments(Options, ["--config", str(tmp_path / "nowhere.yaml")], "")
    config.write_text("- a\n- b\n")
    with pytest.raises(BadValue, match="option: value"):
        parse_arguments(Options, ["--config", str(config)], "")


def test_help_shows_every_option_with_its_text(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(Options, ["--help"], "An example:\n    command --name x")
    shown = capsys.readouterr().out
    assert stopped.value.code == 0
    assert all(text in shown for text in ("--config", "--rates", "a size", "command --name x"))


@pytest.mark.parametrize(
    ("text", "value"), [("16", 16), ("[1, 2]", [1, 2]), ('{"kind": "constant", "r": 3}', {"kind": "constant", "r": 3})]
)
def test_reduction_is_read_as_json(text, value):
    assert parse_reduction(text) == value


def test_reduction_that_is_no_json_is_named():
    with pytest.raises(BadValue, match="r='lots'"):
        parse_reduction("lots")


def test_what_a_scripts_user_can_mend_is_one_line(capsys):
    def refuse():
        raise BadValue("runtimes", ["cuda"], "one of eager, compile")

    with pytest.raises(SystemExit) as ended:
        run_script(refuse)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "Error: runtimes=['cuda']: one of eager, compile.\n"
    for error in (OSError(28, "No space left on device", "runs/x"), ImportError("ONNX takes\n  the package onnx")):

        def fail(error=error):
            raise error

        with pytest.raises(SystemExit) as ended:
            run_script(fail)
        assert ended.value.code == 1
    told = capsys.readouterr().err.splitlines()
    assert told == ["Error: [Errno 28] No space left on device: 'runs/x'", "Error: ONNX takes the package onnx"]
    with pytest.raises(ZeroDivisionError):  # a fault of the program's own is shown as it is
        run_script(lambda: 1 / 0)


def test_every_recipe_with_options_runs_so():
    recipes = {path.stem: path.read_text() for path in (Path(__file__).resolve().parents[2] / "recipes").glob("*.py")}
    others = {name for name, text in recipes.items() if "run_script(main)" not in text}
    assert others == {"model_cards", "peers"} and len(recipes) > 15
