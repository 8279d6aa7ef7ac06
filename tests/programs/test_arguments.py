"""Command lines and YAML files make the same arguments; what is wrong is named."""

import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch.utils.data import DataLoader, Dataset, Subset

from dtem_hf import BadValue
from dtem_hf.benchmark.program import BenchmarkArguments
from dtem_hf.errors import EXTRAS, UnreadableImage
from dtem_hf.evaluation.classification import EvaluateArguments
from dtem_hf.programs.arguments import ModelArguments, option, parse_arguments, parse_reduction, run_script
from dtem_hf.quickstart import QuickstartArguments


@dataclass(kw_only=True)
class Options:
    """For the test."""

    name: str = option("a name")
    size: int = option("a size", default=3)
    rates: list[float] = option("some rates", default_factory=list)
    fast: bool = option("a switch", default=False)
    limit: int | None = option("perhaps", default=None)


class _Unfit(Dataset):
    """Items that raise in the process of a DataLoader, where torch puts the traceback into the message."""

    def __getitem__(self, index):
        raise [BadValue("size", 4, "one size"), UnreadableImage("image a.png cannot be read (so)")][index]


def test_yaml_is_overridden_by_the_command_line(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("name: yaml\nsize: 5\nrates: [0.1, 0.2]\nfast: true\nlimit: null\n")
    read = parse_arguments(Options, ["--config", str(config), "--size", "7"], "")
    assert read == Options(name="yaml", size=7, rates=[0.1, 0.2], fast=True, limit=None)


def test_yaml_values_reach_their_option_whole(tmp_path, monkeypatch):
    """A list is one value of an option that takes one, a leading dash is no option, and `~/` is the home folder."""
    config = tmp_path / "c.yaml"
    config.write_text("name: [4, {kind: linear}]\nrates: [-1, 2]\n")
    read = parse_arguments(Options, ["--config", str(config)], "")
    assert read == Options(name='[4, {"kind": "linear"}]', rates=[-1.0, 2.0])
    config.write_text('name: "-x"\nsize: -1\n')
    assert parse_arguments(Options, ["--config", str(config)], "") == Options(name="-x", size=-1)
    monkeypatch.setenv("HOME", str(tmp_path))
    config.write_text("name: ~/x\n")
    assert parse_arguments(Options, ["--config=~/c.yaml"], "").name == f"{tmp_path}/x"
    assert parse_arguments(Options, ["--name=~/y"], "").name == f"{tmp_path}/y"
    assert parse_arguments(Options, ["--name=y~/"], "").name == "y~/"


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"name: x\nsize: 5\nname: y\n", "'name' is there twice.*line 3"), (b"name: \xff\n", "a YAML file .*0xff")],
)
def test_a_yaml_file_that_is_not_clear_is_named(content, said, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_bytes(content)
    with pytest.raises(BadValue, match=rf"(?s)config='.*c\.yaml': .*{said}"):
        parse_arguments(Options, ["--config", str(config)], "")


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_cannot_be_drawn_from_is_named_at_the_start(seed):
    with pytest.raises(BadValue, match=rf"seed={seed}: a whole number from 0 to 4294967295"):
        parse_arguments(QuickstartArguments, ["--seed", str(seed)], "")


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
    with pytest.raises(BadValue, match=r"sizze.*is no option; did you mean --size\?"):
        parse_arguments(Options, ["--config", str(config)], "")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        parse_arguments(Options, ["--config", str(tmp_path / "nowhere.yaml")], "")
    config.write_text("- a\n- b\n")
    with pytest.raises(BadValue, match="option: value"):
        parse_arguments(Options, ["--config", str(config)], "")


def test_help_shows_every_option_with_its_text_and_its_default(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(Options, ["--help"], "An example:\n    command --name x", leading=("name",))
    shown = capsys.readouterr().out
    assert stopped.value.code == 0
    assert all(text in shown for text in ("--config", "--rates", "a size (default: 3)", "command --name x"))
    assert "NAME [--OPTION VALUE ...]" in shown and "--name may come first" in shown and "(required)" in shown
    assert "None" not in shown


@pytest.mark.parametrize(
    ("given", "meant"),
    [(["--siz", "4"], "--size"), (["--rats=1"], "--rates"), (["--limits", "--nam"], "--limit, --name")],
)
def test_a_mistyped_option_is_answered_with_the_one_that_is_meant(given, meant, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(Options, ["--name", "x", *given], "")
    assert stopped.value.code == 2
    assert (
        capsys.readouterr().err.rstrip().endswith(f"unrecognized arguments: {' '.join(given)}; did you mean {meant}?")
    )


def test_an_option_like_no_other_is_named_alone(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(Options, ["--name", "x", "--zzz"], "")
    assert capsys.readouterr().err.rstrip().endswith("unrecognized arguments: --zzz")


@pytest.mark.parametrize("name", ["/nowhere/model", "./nowhere", "runs/a/model", "tests/nowhere"])
def test_a_folder_that_is_not_there_is_no_hub_id(name, monkeypatch):
    """`tests` is a folder here, so `tests/nowhere` is no user's repository."""
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    with pytest.raises(FileNotFoundError, match=f"there is no folder {name}"):
        parse_arguments(ModelArguments, ["--model", name], "")
    assert parse_arguments(ModelArguments, ["--model", "user/model"], "").model == "user/model"


@pytest.mark.parametrize("name", ["model", "adapter", "data", "output_dir"])
def test_an_empty_path_is_not_the_current_folder(name):
    options = {"model": "m", "data": "d", name: ""}
    with pytest.raises(BadValue, match=f"^{name}='': a path or a name"):
        parse_arguments(EvaluateArguments, [f"--{key}={value}" for key, value in options.items()], "")


def test_a_file_is_no_model_unless_its_config_is_enough(tmp_path):
    words = ["--model", str(tmp_path / "config.json")]
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BadValue, match=r"model='.*config\.json': a folder or a Hub id; this is a file"):
        parse_arguments(BenchmarkArguments, words, "")
    assert parse_arguments(BenchmarkArguments, [*words, "--random_weights", "True"], "").random_weights


@pytest.mark.parametrize("arguments", [["--help"], []])
def test_a_program_whose_packages_are_missing_says_so_in_a_line_and_helps_without_them(arguments):
    """In a process that has none of the extras."""
    absent = sorted({module for modules in EXTRAS.values() for module in modules})
    program = f"import sys; sys.modules.update(dict.fromkeys({absent!r})); sys.argv[1:] = {arguments!r}; "
    program += "from dtem_hf.programs.arguments import run_script; run_script('evaluation.classification')"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert 'pip install "dtem-hf[evaluate]"' in run.stdout + run.stderr and "Traceback" not in run.stderr
    if arguments:
        assert run.returncode == 0 and "python recipes/evaluate.py --model" in run.stdout
    else:
        assert run.returncode == 1 and len(run.stderr.splitlines()) == 1


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
    for place in range(2):
        with pytest.raises(SystemExit) as ended:
            run_script(lambda place=place: list(DataLoader(Subset(_Unfit(), [place]), num_workers=1)))
        assert ended.value.code == 2
    told = capsys.readouterr().err.splitlines()
    assert told == ["Error: size=4: one size.", "Error: image a.png cannot be read (so)"]
    with pytest.raises(ZeroDivisionError):  # a fault of the program's own is shown as it is
        run_script(lambda: 1 / 0)


def test_every_recipe_with_options_runs_so():
    recipes = {path.stem: path.read_text() for path in (Path(__file__).resolve().parents[2] / "recipes").glob("*.py")}
    others = {name for name, text in recipes.items() if "run_script(" not in text}
    assert others == {"peers"} and len(recipes) > 15  # peers.py is a module of functions


@pytest.mark.parametrize(
    ("given", "code", "said"), [(["--help"], 0, "folder of adapter"), (["nowhere"], 2, "folder=")]
)
def test_cards_are_written_in_a_folder_that_has_adapters(given, code, said, monkeypatch, capsys):
    recipe = Path(__file__).resolve().parents[2] / "recipes" / "model_cards.py"
    monkeypatch.setattr(sys, "argv", [str(recipe), *given])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(recipe), run_name="__main__")
    shown = capsys.readouterr()
    assert ended.value.code == code and said in shown.out + shown.err
