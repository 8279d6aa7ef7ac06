"""Command lines from dataclasses and YAML files: `--config file.yaml --lr 0.001`."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable, Collection, Sequence
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from huggingface_hub.errors import RemoteEntryNotFoundError
from transformers import AutoConfig, HfArgumentParser, PretrainedConfig

from ..configuration import CONFIG_NAME, MergeConfig
from ..errors import (
    AdapterError,
    BadValue,
    UnreadableImage,
    UnsupportedModelError,
    check_number,
    check_whole,
    said_by_worker,
    said_of_stop,
)
from ..files import check_file, check_folder, check_is_there, read_text
from ..hub.client import clear_errors
from ..progress import hide_other_bars
from ..schedule import R_EXPECTED
from .processes import choose_device, say


T = TypeVar("T")
LABELS_NAME = "labels.csv"
LABEL_COLUMN_HELP = "column of labels; left out: label, labels or cls; none: no labels are read"
DTYPES = ("float32", "bfloat16", "float16")
_LARGEST_CONFIG = 1 << 20
# Options that name folders of images; without a labels.csv, every image in them is read.
_IMAGE_FOLDERS = ("data", "validation_data", "picture_data", "int8", "check")


def option(help: str, **kwargs: Any) -> Any:
    """A dataclass field with a help text for the command line."""
    return dataclasses.field(metadata={"help": help}, **kwargs)


def at_least(arguments: Any, low: float, *names: str) -> None:
    """Raise ValueError for the first option that is below `low` or not finite; None passes."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and not low <= value < math.inf:
            raise BadValue(name, value, f"{low} or more{', and finite' if value == math.inf else ''}")


def above_zero(arguments: Any, *names: str) -> None:
    """Raise ValueError for the first option that is not a finite number above 0; None passes."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and not 0 < value < math.inf:
            raise BadValue(name, value, f"a number above 0{', and finite' if value == math.inf else ''}")


def one_of(arguments: Any, name: str, allowed: Collection[Any]) -> None:
    """Raise ValueError for a value that is not allowed. A list needs at least one entry, and all must be allowed."""
    value = getattr(arguments, name)
    listed = isinstance(value, list)
    if not (value and set(value) <= set(allowed) if listed else value in allowed):
        raise BadValue(name, value, f"{'some' if listed else 'one'} of {', '.join(filter(None, allowed))}")


@dataclasses.dataclass(kw_only=True)
class ModelArguments:
    """The model of a program, and the device."""

    model: str = option("model: Hub id or local folder")
    device: str = option("device to run on; auto takes an accelerator if there is one", default="auto")

    def choose_device(self) -> torch.device:
        """The device of the option `device`."""
        return choose_device(self.device)


@dataclasses.dataclass(kw_only=True)
class ImageArguments(ModelArguments):
    """The images of a program, and its batch size."""

    data: str = option("images: Hub dataset id, folder of class folders, or folder with labels.csv (file,label)")
    split: str = option("split of a Hub dataset, or of a folder with train, val or test in it", default="validation")
    limit: int | None = option("use only this many images, the first ones", default=None)
    batch_size: int = option("images per batch", default=32)

    def __post_init__(self) -> None:
        at_least(self, 1, "batch_size", "limit")


def parse_arguments(kind: type[T], argv: Sequence[str] | None, description: str, leading: Sequence[str] = ()) -> T:
    """Read arguments with `read_arguments`, and check the paths among them.

    Raises FileNotFoundError for a missing folder in `model` or `adapter`, and ValueError if one of them is a file, a
    path is empty, the path of `output_dir` is a file or lies among the images of the run, or the path of `output` is a
    folder.
    """
    found = read_arguments(kind, argv, description, leading)
    for name in ("model", "adapter", "data", "output_dir", "output"):
        if getattr(found, name, None) == "":  # an empty path is the current folder
            raise BadValue(name, "", "a path or a name")
    for name in ("model", "adapter"):
        if isinstance(value := getattr(found, name, None), str):
            check_is_there(value.partition("@")[0])
            if os.path.isfile(value) and not getattr(found, "random_weights", False):  # these read a config's file
                raise BadValue(name, value, "a folder or a Hub id; this is a file")
    if isinstance(value := getattr(found, "output_dir", None), str):
        check_folder("output_dir", value)
        for name in _IMAGE_FOLDERS:
            _check_outside(value, name, getattr(found, name, None))
    if isinstance(value := getattr(found, "output", None), str):
        check_file("output", value)
    if (seed := getattr(found, "seed", None)) is not None:
        check_whole("seed", seed, 0, 2**32 - 1)
    return found


def _check_outside(output_dir: str, name: str, images: str | None) -> None:
    """Raise ValueError if results would lie among the images of a folder: the next run would read them as images."""
    if images is None or not os.path.isdir(images) or os.path.isfile(os.path.join(images, LABELS_NAME)):
        return
    if Path(output_dir).resolve().is_relative_to(Path(images).resolve()):
        expected = f"a folder outside of {name}={images!r}, where the next run would read its pictures as images"
        raise BadValue("output_dir", output_dir, expected)


def read_arguments(kind: type[T], argv: Sequence[str] | None, description: str, leading: Sequence[str] = ()) -> T:
    """Read a dataclass from a command line. `--config FILE` is a YAML file; other options override its values.

    The options in `leading` may come first, without their names. A leading `~/` is the home folder. Raises ValueError
    for a key in the file that is no option or is there twice, and exits with argparse's message for a bad option.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    bare = list(takewhile(lambda word: not word.startswith("-"), argv))[: len(leading)]
    argv = [*(f"--{name}={word}" for name, word in zip(leading, bare, strict=False)), *argv[len(bare) :]]
    names = [name.upper() for name in leading]
    parser = HfArgumentParser(
        kind,  # type: ignore[arg-type]
        usage=" ".join(["%(prog)s", *names, "[--OPTION VALUE ...]"]),
        description=description,
        epilog=f"{' and '.join(f'--{name}' for name in leading)} may come first, without the name." if leading else "",
        formatter_class=_Help,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these options")
    only_config = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only_config.add_argument("--config")
    first, _ = only_config.parse_known_args(argv)
    if first.config is not None:
        lists = {f.name: parser._option_string_actions[f"--{f.name}"].nargs == "+" for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
        argv = [*_yaml_as_options(Path(first.config).expanduser(), lists), *argv]
    found, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(
            f"unrecognized arguments: {' '.join(unknown)}{_suggestion(unknown, parser._option_string_actions)}"
        )
    parsed = vars(found)
    return kind(**{f.name: _at_home(parsed[f.name]) for f in dataclasses.fields(kind) if f.init})  # type: ignore[arg-type]


def _at_home(value: Any) -> Any:
    """Expand a leading `~/` in a value or in each entry of a list: no shell does that in YAML and behind `=`."""
    if isinstance(value, list):
        return [_at_home(each) for each in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Show the description unchanged, and the default of every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.required:
            return f"{action.help} (required)"
        return action.help if action.default in (None, [], "") else super()._get_help_string(action)


def _suggestion(unknown: Sequence[str], options: Collection[str]) -> str:
    """Similar option names for mistyped ones; "" if there are none."""
    near = [
        match
        for word in unknown
        if word.startswith("-")
        for match in get_close_matches(word.partition("=")[0], [name for name in options if "-" not in name[2:]], 1)
    ]
    return f"; did you mean {', '.join(near)}?" if near else ""


def run_script(program: str | Callable[[], None]) -> None:
    """Run a script: a function, or the `main` of a module of dtem_hf.

    It shows an error that the user can correct as one line on stderr, and exits with 2 for a bad value, with 1 for a
    missing file or package, or a file that cannot be written, and with 130 after Ctrl-C.
    """
    hide_other_bars()
    try:
        (load_program(program) if isinstance(program, str) else program)()
    except KeyboardInterrupt as error:
        say(said_of_stop(error))
        raise SystemExit(130) from error
    except (
        BadValue,
        UnsupportedModelError,
        AdapterError,
        UnreadableImage,
        OSError,
        ImportError,
        RuntimeError,
    ) as error:
        said = said_by_worker(error)  # torch makes a RuntimeError of a worker's BadValue
        if isinstance(error, RuntimeError) and said is None:
            raise
        print(f"Error: {' '.join((said or str(error)).split())}", file=sys.stderr)
        raise SystemExit(1 if isinstance(error, (OSError, ImportError)) else 2) from error


def load_program(module: str, argv: Sequence[str] | None = None) -> Callable[[], None]:
    """The `main` of a module of dtem_hf, with the arguments of a command line (None: those of the process).

    Raises ImportError if packages are missing. With `--help`, it shows the module's docstring instead.
    """
    wanted = list(sys.argv[1:] if argv is None else argv)
    try:
        return partial(import_module(f"dtem_hf.{module}").main, argv)
    except ImportError as error:
        if not {"-h", "--help"} & set(wanted):
            raise
        path = Path(__file__).parents[1].joinpath(*module.split("."))
        source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        text = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8")))
        return partial(print, f"{text}\n\nTo see its options, install its packages. {error}")


class _UniqueKeys(yaml.SafeLoader):
    """A safe loader that refuses a repeated key; YAML's own loader takes the last value."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for place, (key, _) in enumerate(node.value):
            if key.value in keys[:place]:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is there twice", key.start_mark)
        return super().construct_mapping(node, deep)


def _yaml_as_options(path: Path, lists: dict[str, bool]) -> list[str]:
    """The words of a command line for a YAML file; `lists` says for each option whether it takes a list."""
    if not path.is_file():
        raise FileNotFoundError(f"--config {path}: this file does not exist")
    try:
        values = yaml.load(read_text(path, _LARGEST_CONFIG), Loader=_UniqueKeys) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadValue("config", str(path), f"a YAML file ({error})") from error
    if not isinstance(values, dict):
        raise BadValue("config", str(path), "a YAML file of `option: value` lines")
    options: list[str] = []
    for name, value in values.items():
        if name not in lists:
            raise BadValue(
                "config",
                str(path),
                f"it sets {name!r}, which is no option{_suggestion([f'--{name}'], [f'--{each}' for each in lists])}",
            )
        if value is None:
            continue
        items = value if isinstance(value, list) and lists[name] else [value]
        words = [json.dumps(item) if isinstance(item, (dict, list)) else str(item) for item in items]
        options += [f"--{name}", *words] if lists[name] else [f"--{name}={words[0]}"]
    return options


def read_config(model: str) -> PretrainedConfig:
    """The config of a model. Raises OSError that says what to do if neither folder nor Hub id exists.

    Raises AdapterError for an adapter's folder.
    """
    check_is_there(model)
    if os.path.isfile(os.path.join(model, CONFIG_NAME)) and not os.path.isfile(os.path.join(model, "config.json")):
        raise AdapterError(f"{model} is a merge adapter and no model: name its backbone as the model.")
    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=False)
    except OSError as error:
        if os.path.isdir(model) or error.__cause__ is None or isinstance(error.__cause__, RemoteEntryNotFoundError):
            raise
        with clear_errors(model):
            raise error.__cause__ from None


def check_no_adapter(option: str, config: MergeConfig | None) -> None:
    """Raise ValueError for a config without an adapter whose method is useless untrained."""
    if config is not None and config.needs_adapter:
        raise BadValue(option, config.method, "a method that needs no training, or an adapter of this method")


def parse_reduction(text: str, name: str = "r") -> Any:
    """Read r from a command line: `16`, `[16, 16, 8]` or `{"kind": "linear", "r": 13, "slope": 0.5}`."""
    try:
        r = json.loads(text)
    except ValueError as error:
        raise BadValue(name, text, R_EXPECTED) from error
    if r is None:  # JSON's null would mean that r is left out
        raise BadValue(name, text, R_EXPECTED)
    return r


def read_reduction(r: str | None, flops: float | None) -> dict[str, Any]:
    """The arguments of `set_reduction`, from the options r and flops; empty if both are left out.

    Raises ValueError if both are given, and for invalid values.
    """
    if r is not None and flops is not None:
        raise BadValue("r, flops", (r, flops), "only one of them")
    if flops is not None:
        check_number("flops", flops, 0, 1, above=True)
        return {"flops": flops}
    return {} if r is None else {"r": parse_reduction(r)}
