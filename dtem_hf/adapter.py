"""A merge adapter: the learned embedding of one backbone, as a folder or a Hub repository of about a megabyte.

A repository holds `merge_config.json`, `merge_adapter.safetensors` and `README.md`. Nothing in it is run, no path in
it is followed, and its tensors are checked against its config before they are read.
"""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from huggingface_hub import ModelHubMixin, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .card import CARD_NAME, card_of
from .configuration import CONFIG_NAME, MergeConfig
from .embedding import DecoupledEmbedding
from .errors import AdapterError, BadValue
from .files import read_json, replacing, write_json


WEIGHTS_NAME = "merge_adapter.safetensors"
_LARGEST_HEADER = 1 << 20


@dataclass(frozen=True)
class BackboneFacts:
    """What an adapter was trained for. `base_model` and `base_revision` name it on the Hub, the rest must fit."""

    model_type: str
    num_layers: int
    hidden_size: int
    base_model: str | None = None
    base_revision: str | None = None

    @classmethod
    def from_dict(cls, values: Any) -> BackboneFacts:
        """Read the `backbone` entry of an adapter's config. Raises ValueError naming what is wrong."""
        if not isinstance(values, dict):
            raise BadValue("backbone", values, f"an object with {', '.join(f.name for f in fields(cls))}")
        if not isinstance(values.get("model_type"), str):
            raise BadValue("backbone.model_type", values.get("model_type"), "text")
        for name in ("num_layers", "hidden_size"):
            value = values.get(name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 1 << 20:
                raise BadValue(f"backbone.{name}", value, "a whole number, 1 or more")
        for name in ("base_model", "base_revision"):
            if not isinstance(values.get(name), (str, type(None))):
                raise BadValue(f"backbone.{name}", values[name], "text or null")
        return cls(**{f.name: values.get(f.name) for f in fields(cls)})  # type: ignore[arg-type]


class MergeAdapter(ModelHubMixin):
    """A method's config, its learned tensors, and the backbone they were learned for.

    `tensors`: `layers.{i}.weight` [d', D] and `layers.{i}.bias` [d'], float32.
    """

    def __init__(self, config: MergeConfig, tensors: dict[str, Tensor], backbone: BackboneFacts) -> None:
        self.config = config
        self.backbone = backbone
        self.tensors = tensors

    @classmethod
    def from_embedding(
        cls, config: MergeConfig, embedding: DecoupledEmbedding | None, backbone: BackboneFacts
    ) -> MergeAdapter:
        """Copy what a merged model has learned, in float32. Raises AdapterError where its method learns nothing."""
        if embedding is None:
            raise AdapterError(f"method={config.method!r} learns nothing, so there is no adapter; use method 'dtem'.")
        tensors = {key: value.detach().float().cpu().clone() for key, value in embedding.state_dict().items()}
        return cls(config, tensors, backbone)

    @property
    def embed_dim(self) -> int:
        """Width d' of the embedding."""
        return self.tensors["layers.0.weight"].shape[0]

    def check_fits(self, backbone: BackboneFacts) -> None:
        """Raise AdapterError that says which number differs from the backbone it is to be attached to."""
        for name in ("model_type", "num_layers", "hidden_size"):
            ours, theirs = getattr(self.backbone, name), getattr(backbone, name)
            if ours != theirs:
                raise AdapterError(f"{name}: the adapter was trained for {ours!r}, the model has {theirs!r}.")

    def load_into(self, embedding: DecoupledEmbedding | None) -> None:
        """Copy the tensors into a model's embedding of the same shape. Raises AdapterError where it has none."""
        if embedding is None:
            raise AdapterError(
                f"method={self.config.method!r} learns nothing, so no model has a place for this adapter."
            )
        if embedding.embed_dim != self.embed_dim:
            raise AdapterError(
                f"embed_dim: the adapter has {self.embed_dim}, the model's embedding {embedding.embed_dim}."
            )
        embedding.load_state_dict(self.tensors)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **kwargs: Any,
    ) -> str | None:
        """Write config, tensors and card into a folder (made if needed); each file whole or not at all.

        A card that is there is kept. Other files are left alone. Returns the commit's URL where it was pushed.
        """
        directory = Path(save_directory)
        with replacing(directory / WEIGHTS_NAME) as temporary:
            save_file(self.tensors, temporary, metadata={"format": "pt"})
        write_json(directory / CONFIG_NAME, {**self.config.to_dict(), "backbone": asdict(self.backbone)})
        if not (directory / CARD_NAME).exists():
            card_of(self.config, self.backbone, evaluation=None).save(directory / CARD_NAME)
        if push_to_hub:
            kwargs.pop("config", None), kwargs.pop("model_card_kwargs", None)
            return self.push_to_hub(repo_id or directory.name, **kwargs)
        return None

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> MergeAdapter:
        """Read an adapter from a folder or from the Hub.

        Raises FileNotFoundError where there is none, AdapterError (or ValueError naming a config field) where it is
        not sound. The backbone is not downloaded.
        """
        name = os.fspath(pretrained_model_name_or_path)
        if os.path.isdir(name):
            return cls._read(Path(name) / CONFIG_NAME, Path(name) / WEIGHTS_NAME, name)
        options: dict[str, Any] = {
            "revision": revision,
            "token": token,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
            "force_download": force_download,
        }
        try:
            config_path = Path(hf_hub_download(name, CONFIG_NAME, **options))
            weights_path = Path(hf_hub_download(name, WEIGHTS_NAME, **options))
        except HFValidationError as error:
            raise FileNotFoundError(
                f"merge={name!r} is neither a folder here nor a Hub id (user/repo): {error}"
            ) from error
        except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError) as error:
            raise FileNotFoundError(
                f"no merge adapter at {name!r} (revision {revision or 'main'}): {error}"
            ) from error
        return cls._read(config_path, weights_path, name)

    @classmethod
    def from_reference(cls, reference: str | os.PathLike[str], **hub_kwargs: Any) -> MergeAdapter:
        """Read what `merge=` may name: a folder, `user/repo`, or `user/repo@revision`."""
        name, revision = split_reference(reference)
        pinned: dict[str, Any] = {} if revision is None else {"revision": revision}
        return cls.from_pretrained(name, **pinned, **hub_kwargs)

    @classmethod
    def _read(cls, config_path: Path, weights_path: Path, name: str) -> MergeAdapter:
        values = read_json(config_path)
        if not isinstance(values, dict):
            raise AdapterError(f"{name}: {CONFIG_NAME} holds no JSON object.")
        backbone = BackboneFacts.from_dict(values.pop("backbone", None))
        config = MergeConfig.from_dict(values)
        if not weights_path.is_file():
            raise FileNotFoundError(f"there is no {WEIGHTS_NAME} in {name}")
        return cls(config, _read_tensors(weights_path, backbone, getattr(config, "embed_dim", None)), backbone)


def split_reference(reference: str | os.PathLike[str]) -> tuple[str, str | None]:
    """A folder or a Hub id, and the revision that `user/repo@revision` pins."""
    pinned = None
    if isinstance(reference, str) and not os.path.isdir(reference):
        pinned = re.fullmatch(r"([^@]+)@([^@]+)", reference)
    return (pinned[1], pinned[2]) if pinned else (os.fspath(reference), None)


def _read_tensors(path: Path, backbone: BackboneFacts, embed_dim: int | None) -> dict[str, Tensor]:
    """Read an adapter's tensors, whose names, shapes and dtype are checked before anything is allocated."""
    expected = {f"layers.{i}.{part}" for i in range(min(backbone.num_layers, 4096)) for part in ("weight", "bias")}
    tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            if names != expected:
                odd = sorted(names ^ expected)
                raise AdapterError(
                    f"{path.name}: its tensors are not those of {backbone.num_layers} layers; "
                    f"first difference: {odd[0]!r}."
                )
            width = embed_dim or file.get_slice("layers.0.bias").get_shape()[0]
            for key in sorted(names):
                part = file.get_slice(key)
                shape = [width, backbone.hidden_size] if key.endswith("weight") else [width]
                if part.get_shape() != shape or part.get_dtype() != "F32":
                    raise AdapterError(
                        f"{path.name}: {key} is {part.get_dtype()} {part.get_shape()}, "
                        f"and F32 {shape} would fit its config."
                    )
            for key in sorted(names):
                tensors[key] = file.get_tensor(key)
                if not tensors[key].isfinite().all():
                    raise AdapterError(f"{path.name}: {key} holds NaN or infinity.")
    except (SafetensorError, OSError, IndexError) as error:
        raise AdapterError(f"{path.name} is not a readable safetensors file: {error}.") from error
    return tensors
