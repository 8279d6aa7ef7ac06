"""The errors that callers may catch, and the checks of numbers and of optional packages that raise errors."""

from __future__ import annotations

import re
import sys
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import packages_distributions
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any


# Bounds of the numbers in configs: above any model's, and far below where a float or a tensor's size overflows.
MOST_LAYERS = 4096
MOST_TOKENS = 1 << 20
WIDEST = 1 << 20
# The modules that each extra of pyproject.toml installs. A merged model runs without any of them.
_PROGRAMS = ("accelerate", "datasets", "psutil", "pyarrow")
_TRAIN = (*_PROGRAMS, "kornia")
_EVALUATE = (*_PROGRAMS, "evaluate", "matplotlib", "scipy")
_OPENVINO = (*_PROGRAMS, "onnx", "onnxscript", "openvino")
EXTRAS = {
    "captions": (*_EVALUATE, "pycocoevalcap"),
    "evaluate": _EVALUATE,
    "int8": (*_OPENVINO, "nncf"),
    "onnx": (*_PROGRAMS, "onnx", "onnxruntime", "onnxscript"),
    "openvino": _OPENVINO,
    "plots": ("matplotlib",),
    "quickstart": (*dict.fromkeys(_TRAIN + _EVALUATE), "sklearn"),
    "train": _TRAIN,
}

_IN_WORKER = re.compile(r"Caught (\w+) in DataLoader worker process \d+\.\nOriginal Traceback")


class BadValue(ValueError):
    """A field holds an invalid value. The message names the field, the value, and what would fit."""

    def __init__(self, field: str, value: Any, expected: str) -> None:
        try:
            shown = repr(value)
        except ValueError:  # Python does not print integers of more than 4,300 digits
            shown = f"<{type(value).__name__} of too many digits>"
        super().__init__(f"{field}={shown if len(shown) <= 200 else shown[:200] + '…'}: {expected}.")
        self.field, self.value, self.expected = field, value, expected

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.field, self.value, self.expected)


class NoTrainedHead(BadValue):
    """A checkpoint holds an encoder without a classification head; a classifier would get a random head."""


class UnsupportedModelError(ValueError):
    """The package has no family for a model, or it cannot merge a model with this setting."""


class AdapterError(ValueError):
    """An adapter cannot be read, or does not fit the model."""


class UnreadableImage(ValueError):
    """An image cannot be decoded; the message names it."""


def said_of_stop(error: KeyboardInterrupt) -> str:
    """What to print when Ctrl-C ended a program; without a message, the program keeps no part of its work."""
    return f"Stopped by Ctrl-C: {str(error) or 'the same command starts over'}"


def first_line(error: BaseException) -> str:
    """The first non-empty line of an error's message, or the name of its class if there is none."""
    return next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)


def said_by_worker(error: BaseException) -> str | None:
    """What an error said that a DataLoader's worker raised, without the traceback; None for all other errors."""
    found = _IN_WORKER.match(str(error))
    return str(error).rpartition(f"{found[1]}: ")[2] if found else None


def need(extra: str, what: str, *modules: str) -> None:
    """Raise ImportError if packages that `what` needs are missing; the message names them and the command to install.

    `modules` are the needed modules of the extra; left out, all of them.
    """
    missing = [module for module in modules or EXTRAS[extra] if not _is_installed(module)]
    if missing:
        raise ImportError(f'{what} needs {", ".join(missing)}: pip install "dtem-hf[{extra}]"')


def _is_installed(module: str) -> bool:
    """Whether a package is installed. A script or a plain folder of its name does not count."""
    found = _find_past_scripts(module)
    # pycocoevalcap is a plain folder, too, but a distribution installs it.
    return found is not None and (found.has_location or module in packages_distributions())


def _find_past_scripts(module: str) -> ModuleSpec | None:
    """Find a package in the folders of Python's path that hold no script of its name.

    Python searches the folder of the running script first, and recipes/ has an `evaluate.py`.
    """
    if sys.modules.get(module, module) is None:  # as `import` reads it: there is no such package
        return None
    return PathFinder.find_spec(module, [each for each in sys.path if not Path(each, f"{module}.py").is_file()])


def import_past_scripts(module: str) -> None:
    """Import a package; a later `import` then takes it, and not a script of its name nearer on Python's path."""
    if module not in sys.modules:
        spec = _find_past_scripts(module)
        if spec is None or spec.loader is None:
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)
        sys.modules[module] = made = module_from_spec(spec)
        try:
            spec.loader.exec_module(made)
        except BaseException:
            del sys.modules[module]
            raise


def check_whole(field: str, value: Any, low: int, high: int) -> None:
    """Raise BadValue unless `value` is an int from `low` to `high`."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise BadValue(field, value, f"a whole number from {low} to {high}")


def check_number(field: str, value: Any, low: float, high: float, *, above: bool = False) -> None:
    """Raise BadValue unless `value` is an int or a float from `low` to `high`; `above`: greater than `low`."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or (above and value == low):
        raise BadValue(field, value, f"a number {f'above {low}, up' if above else f'from {low}'} to {high}")
