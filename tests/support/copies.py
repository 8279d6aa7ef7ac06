"""Copies of a model that is built once: by pickle, in a fifth of the time that building it anew takes."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


_MAKERS: dict[Any, Callable[[], Any]] = {}


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, tensors: dict[int, Tensor]) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.tensors = tensors

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, Tensor):
            return None
        self.tensors[id(value)] = value
        return id(value)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: dict[int, Tensor]) -> None:
        super().__init__(file)
        self.tensors, self.copied = tensors, dict[int, Tensor]()

    def persistent_load(self, key: int) -> Tensor:
        if key not in self.copied:  # what is shared in the model is shared in its copy
            value = self.tensors[key]
            copied = value.detach().clone()
            is_parameter = isinstance(value, nn.Parameter)
            self.copied[key] = nn.Parameter(copied, value.requires_grad) if is_parameter else copied
        return self.copied[key]


def built_once(key: Any, build: Callable[[], Any]) -> Any:
    """A copy of the model that `build` makes, which runs once for each key. Copies share nothing.

    Where a model cannot be pickled (transformers puts local functions into backbones), every call builds one.
    """
    if key not in _MAKERS:
        _MAKERS[key] = _copier(build)
    return _MAKERS[key]()


def _copier(build: Callable[[], Any]) -> Callable[[], Any]:
    tensors: dict[int, Tensor] = {}
    file = io.BytesIO()
    try:
        _Pickler(file, tensors).dump(build())
    except (AttributeError, pickle.PicklingError):
        return build
    pickled = file.getvalue()
    return lambda: _Unpickler(io.BytesIO(pickled), tensors).load()
