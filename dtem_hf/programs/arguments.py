"""Command lines made from dataclasses, with YAML files underneath: `--config file.yaml --lr 0.001`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Collection, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from transformers import HfArgumentParser

from ..errors import AdapterError, BadValue, UnsupportedModelError
from .processes import choose_device


T = TypeVar("T")
LABEL_COLUMN_HELP = "column of labels; left out: label, labels or cls; none: no labels are read"
DTYPES = ("float32", "bfloat16", "float16")


def option(help: str, **kwargs: Any) -> Any:
    """A dataclass field with its help text, which the command line shows."""
    return dataclasses.field(metadata={"help": help}, **kwargs)


def at_least(arguments: Any, low: float, *names: str) -> None:
    """Raise ValueError for the first option below `low`; None is no value and passes."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and not value >= low:
            raise BadValue(name, value, f"{low} or more")


def one_of(arguments: Any, name: str, allowed: Collection[Any]) -> None:
    """Raise ValueError for an option that is not allowed; of a list, every entry is looked at, and one is needed."""
    value = getattr(arguments, name)
    listed = isinstance(value, list)
    if not (value and set(value) <= set(allowed) if listed else value in allowed):
        raise BadValue(name, value, f"{'some' if listed else 'one'} of {', '.join(filter(None, allowed))}")


@dataclasses.dataclass(kw_only=True)
class ModelArguments:
    """The model of a program, and where it runs."""

    model: str = option("model: Hub id or local folder")
    device: str = option("where to run; auto takes an accelerator if there is one", default="auto")

    def choose_device(self) -> torch.device:
        """The device that is asked for."""
        return choose_device(self.device)


@dataclasses.dataclass(kw_only=True)
class ImageArguments(ModelArguments):
    """The images of a program, and how many of them run at once."""

    data: str = option("images: Hub dataset id, folder of class folders, or folder with labels.csv (file,label)")
    split: str = option("split of a Hub dataset, or of a folder with train, val or test in it", default="validation")
    limit: int | None = option("use only the first so many images", default=None)
    batch_size: int = option("images per batch", default=32)

    def __post_init__(self) -> None:
        at_least(self, 1, "batch_size", "limit")


def parse_arguments(kind: type[T], argv: Sequence[str] | None, description: str, leading: Sequence[str] = ()) -> T:
    """Read a dataclass from a command line; `--config FILE` is a YAML file whose values the other options override.

    The options in `leading` may stand first, without their names. Raises ValueError for a key in the file that is not
    an option, and exits with argparse's message for a bad option.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    bare = list(takewhile(lambda word: not word.startswith("-"), argv))[: len(leading)]
    argv = [*(f"--{name}={word}" for name, word in zip(leading, bare, strict=False)), *argv[len(bare) :]]
    parser = HfArgumentParser(
        kind,  # type: ignore[arg-type]
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of the options below")
    first, _ = _only_config().parse_known_args(argv)
    if first.config is not None:
        argv = [*_yaml_as_options(Path(first.config), {f.name for f in dataclasses.fields(kind)}), *argv]  # type: ignore[arg-type]
    parsed = vars(parser.parse_args(argv))
    return kind(**{f.name: parsed[f.name] for f in dataclasses.fields(kind) if f.init})  # type: ignore[arg-type]


def run_script(main: Callable[[], None]) -> None:
    """Run a script; an error that its user can repair is one line on stderr.

    The exit code is 2 for a bad value, 1 for something missing or a file that cannot be written (a full disk).
    """
    try:
        main()
    except (BadValue, UnsupportedModelError, AdapterError, OSError, ImportError) as error:
        print(f"Error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, ValueError) else 1) from error


def _only_config() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    return parser


def _yaml_as_options(path: Path, known: set[str]) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"--config {path}: there is no such file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise BadValue("config", str(path), f"a YAML file ({error})") from error
    if not isinstance(values, dict):
        raise BadValue("config", str(path), "a YAML file of `option: value` lines")
    options: list[str] = []
    for name, value in values.items():
        if name not in known:
            raise BadValue("config", str(path), f"it sets {name!r}, which is not an option; known: {sorted(known)}")
        if value is None:
            continue
        options.append(f"--{name}")
        if isinstance(value, list) and all(isinstance(item, (str, int, float)) for item in value):
            options += [str(item) for item in value]
        else:
            options.append(json.dumps(value) if isinstance(value, (dict, list)) else str(value))
    return options


def parse_reduction(text: str) -> Any:
    """Read r from a command line: `16`, `[16, 16, 8]` or `{"kind": "linear", "r": 13, "slope": 0.5}`."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise BadValue(
            "r", text, 'an int, a JSON list, or a JSON schedule like {"kind": "linear", "r": 13}'
        ) from error
