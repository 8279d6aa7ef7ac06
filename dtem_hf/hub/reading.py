"""Read an adapter from a folder or the Hub: two files of bounded size. No content is executed or used as a path."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, deserialize
from torch import Tensor

from ..configuration import CONFIG_NAME, DTPSConfig, MergeConfig, check_version
from ..embedding import EmbeddingShape
from ..errors import WIDEST, AdapterError, BadValue
from ..files import LARGEST_JSON, read_bytes, read_json
from .client import download, drop_cached
from .facts import BackboneFacts
from .layout import MODEL_CONFIG_NAME, WEIGHTS_NAME
from .records import clean


# Far more than any backbone needs: 48 layers of width 3,200 with an embedding of width 256 are 157 MB.
_LARGEST_WEIGHTS = 1 << 28
_LARGEST_HEADER = 1 << 20
# Lengths of a layer's shifts, in widths of the backbone: two norms, four projections and a wide MLP come to 17.
_MOST_SHIFTS = 32
_SHIFT_NAME = re.compile(r"shifts\.([a-z0-9_]+(?:\.[a-z0-9_]+)+)", re.ASCII)


class AdapterConfig(NamedTuple):
    """The content of `merge_config.json`: the method's config, the backbone, and the tensor file's SHA-256."""

    config: MergeConfig
    backbone: BackboneFacts
    digest: str | None

    @property
    def largest_weights(self) -> int:
        """The largest size of the tensor file in bytes; an embedding is at most as wide as its backbone."""
        width = getattr(self.config, "embed_dim", None) or self.backbone.hidden_size
        # The embedding, exponents of at most `hidden_size` heads, one share of lost length, and shifts.
        numbers = self.backbone.num_layers * (width + 1 + _MOST_SHIFTS) * (self.backbone.hidden_size + 1)
        return min(_LARGEST_HEADER + 4 * numbers, _LARGEST_WEIGHTS)


def read_adapter(
    name: str, revision: str | None = None, **options: Any
) -> tuple[MergeConfig, BackboneFacts, dict[str, Tensor]]:
    """Read an adapter from a folder or a Hub repository; `options` go to `hf_hub_download`.

    Raises FileNotFoundError, PermissionError, or AdapterError for an invalid adapter.
    """
    if os.path.isdir(name):
        check_is_adapter(name)
        adapter = read_config(Path(name, CONFIG_NAME), name)
        weights = Path(name, WEIGHTS_NAME)
        return adapter.config, adapter.backbone, read_tensors(weights, adapter, name)
    path, commit = download(name, CONFIG_NAME, LARGEST_JSON, revision, **options)
    with _dropped_if_damaged(path):
        adapter = read_config(path, name)
    # From the same commit: a push in between must not mix two adapters.
    weights, _ = download(name, WEIGHTS_NAME, adapter.largest_weights, commit, **options)
    with _dropped_if_damaged(path, weights):
        return adapter.config, adapter.backbone, read_tensors(weights, adapter, name)


def recorded_merge(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The merge config that a saved merged model, or one of its parts, records in a folder; else None.

    Raises ValueError for a `config.json` that cannot be read.
    """
    if not Path(folder, MODEL_CONFIG_NAME).is_file() or os.path.lexists(Path(folder, CONFIG_NAME)):
        return None
    configs = [read_json(Path(folder, MODEL_CONFIG_NAME))]
    while configs:
        config = configs.pop()
        merge = config.get("merge") if isinstance(config, dict) else None
        if isinstance(merge, dict) and "method" in merge:
            return merge
        configs += [part for part in config.values() if isinstance(part, dict)] if isinstance(config, dict) else []
    return None


def check_is_adapter(folder: str | os.PathLike[str]) -> None:
    """Raise FileNotFoundError for a folder that holds a model instead of an adapter, and say what to do."""
    if not Path(folder, MODEL_CONFIG_NAME).is_file() or os.path.lexists(Path(folder, CONFIG_NAME)):
        return
    if recorded_merge(folder) is None:
        raise FileNotFoundError(f"{folder} holds a plain model and no adapter: there is no {CONFIG_NAME}")
    raise FileNotFoundError(
        f"{folder} holds a merged model and no adapter: load it with from_pretrained(folder) of dtem_hf's Auto "
        "classes, and save or publish it with its own save_pretrained or push_to_hub"
    )


def split_reference(reference: str | os.PathLike[str]) -> tuple[str, str | None]:
    """Split `user/repo@revision` into a Hub id and a revision; a folder has no revision."""
    pinned = None
    if isinstance(reference, str) and not os.path.isdir(reference):
        pinned = re.fullmatch(r"([^@]+)@([^@]+)", reference)
    return (pinned[1], pinned[2]) if pinned else (os.fspath(reference), None)


def read_config(path: Path, name: str) -> AdapterConfig:
    """Read an adapter's `merge_config.json`. Raises FileNotFoundError, or AdapterError naming adapter and field."""
    try:
        values = read_json(path)
        if not isinstance(values, dict):
            raise BadValue(CONFIG_NAME, values, "a JSON object")
        # Check the version first: all other fields may differ in another version.
        check_version(values.pop("version", None))
        backbone = BackboneFacts.from_dict(values.pop("backbone", None))
        digest = values.pop("tensors_sha256", None)
        if digest is not None and not re.fullmatch("[0-9a-f]{64}", str(digest)):
            raise BadValue("tensors_sha256", digest, "64 hexadecimal digits, or null")
        return AdapterConfig(MergeConfig.from_dict(values), backbone, digest)
    except BadValue as error:
        raise AdapterError(f"{name}: in {CONFIG_NAME}, {error}") from error


def read_tensors(path: Path, adapter: AdapterConfig, name: str) -> dict[str, Tensor]:
    """Read an adapter's tensors. Raises FileNotFoundError, or AdapterError naming the adapter and the tensor."""
    try:
        content = read_bytes(path, adapter.largest_weights)
    except BadValue as error:
        raise AdapterError(f"{name}: {error}") from error
    return parse_tensors(content, adapter, name)


def parse_tensors(content: bytes, adapter: AdapterConfig, name: str) -> dict[str, Tensor]:
    """The tensors in the content of an adapter's file, by name.

    Raises AdapterError if they are not the tensors that the config asks for.
    """
    where = f"{name}: {WEIGHTS_NAME}"
    length = int.from_bytes(content[:8], "little")
    if length > _LARGEST_HEADER:
        raise AdapterError(
            f"{where} is not a readable safetensors file: its header has {length} bytes, and may have "
            f"{_LARGEST_HEADER} at most."
        )
    try:
        found = dict(deserialize(content))
    except SafetensorError as error:
        raise AdapterError(f"{where} is not a readable safetensors file: {clean(error)[:200]}.") from error
    config, backbone = adapter.config, adapter.backbone
    predictors = len(config.schedule.chosen(backbone.num_layers)) if isinstance(config, DTPSConfig) else 0
    shape = EmbeddingShape(
        backbone.num_layers,
        backbone.hidden_size,
        # The config may leave the width open, and does not hold the number of heads: read them off the tensors.
        0 if predictors else getattr(config, "embed_dim", None) or _length(found.get("layers.0.bias"), WIDEST),
        _length(found.get("exponents.0"), backbone.hidden_size) if getattr(config, "learn_exponents", False) else 0,
        getattr(config, "learn_norms", False),
        predictors,
        # The names of shifts are the backbone's; `MergeAdapter.load_into` checks that the model has them.
        tuple(
            (known[1], _length(part, WIDEST)) for key, part in found.items() if (known := _SHIFT_NAME.fullmatch(key))
        )
        if getattr(config, "learn_shifts", False)
        else (),
    )
    expected = shape.tensors()
    if odd := found.keys() ^ expected.keys():
        raise AdapterError(
            f"{where}: its tensors are not those of {backbone.num_layers} layers; first difference: "
            f"{min(odd)[:200]!r}."
        )
    tensors = {}
    for key, wanted in sorted(expected.items()):
        part = found[key]
        if part["shape"] != wanted or part["dtype"] != "F32":
            raise AdapterError(
                f"{where}: {key} is {part['dtype']} {part['shape']}, and its config needs F32 {wanted}."
            )
        tensors[key] = torch.frombuffer(part["data"], dtype=torch.float32).reshape(wanted)
        # NumPy, because torch would start its threads, which a process that forks later must not have.
        if not np.isfinite(tensors[key].numpy()).all():
            raise AdapterError(f"{where}: {key} holds NaN or infinity.")
    digest = tensors_digest(content)
    if adapter.digest not in (None, digest):
        raise AdapterError(
            f"{where} is not the file that {CONFIG_NAME} was written for: its SHA-256 is {digest}, and "
            f"{adapter.digest} is recorded. The file is damaged, or from another adapter; save or download the "
            "adapter again."
        )
    return tensors


def tensors_digest(content: bytes) -> str:
    """The SHA-256 of the tensor file, which an adapter's config records; Git LFS names the file by it, too."""
    return hashlib.sha256(content).hexdigest()


def _length(vector: Any, most: int) -> int:
    """The length of a vector in a file, at least 1 and at most `most`; 1 if it is missing."""
    shape = vector["shape"] if vector else []
    return min(max(shape[0], 1), most) if shape else 1


@contextmanager
def _dropped_if_damaged(*paths: Path) -> Iterator[None]:
    """Remove files from the Hub's cache if the block finds them invalid, so that they are downloaded again."""
    try:
        yield
    except AdapterError as error:
        if getattr(error.__cause__, "field", None) != "version":  # a newer dtem_hf can read this file
            for path in paths:
                drop_cached(path)
        raise
