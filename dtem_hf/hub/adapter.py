"""A merge adapter: the learned embedding of one backbone, as a folder or a Hub repository of about a megabyte.

A repository holds `merge_config.json`, `merge_adapter.safetensors` and `README.md`. Two of them are read, the first
two: nothing is run, no path in them is followed, sizes are bounded, and the tensors are checked against the config
before they are read.
"""

from __future__ import annotations

import os
import re
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, ModelCard, ModelHubMixin
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..configuration import CONFIG_NAME, MergeConfig, check_version
from ..embedding import DecoupledEmbedding, EmbeddingShape
from ..errors import AdapterError, BadValue
from ..files import LARGEST_JSON, read_json, replacing, write_json
from .card import CARD_NAME, card_of
from .client import download
from .publishing import publish_folder
from .records import clean


WEIGHTS_NAME = "merge_adapter.safetensors"
# Far above any backbone's: 48 layers of width 3,200 and an embedding of 256 are 157 MB.
_LARGEST_WEIGHTS = 1 << 28
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
        for name, most in (("num_layers", 4096), ("hidden_size", 1 << 20)):
            value = values.get(name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
                raise BadValue(f"backbone.{name}", value, f"a whole number, 1 to {most}")
        for name in ("base_model", "base_revision"):
            if not isinstance(values.get(name), (str, type(None))):
                raise BadValue(f"backbone.{name}", values[name], "text or null")
        return cls(**{f.name: values.get(f.name) for f in fields(cls)})  # type: ignore[arg-type]


class MergeAdapter(ModelHubMixin, library_name="dtem-hf", tags=["token-merging"], license="apache-2.0"):
    """A method's config, its learned tensors, and the backbone they were learned for.

    `tensors`: `layers.{i}.weight` [d', D] and `layers.{i}.bias` [d'], float32, and what `DecoupledEmbedding` has
    beside them where the config says so.
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
        return cls(config, embedding.adapter_values(), backbone)

    @property
    def embed_dim(self) -> int:
        """Width d' of the embedding."""
        return self.tensors["layers.0.weight"].shape[0]

    def check_fits(self, backbone: BackboneFacts) -> None:
        """Raise AdapterError that says which number differs from the backbone it is to be attached to.

        Warns where everything fits and the backbone is known to be another one, or another revision of the same.
        """
        for name in ("model_type", "num_layers", "hidden_size"):
            ours, theirs = getattr(self.backbone, name), getattr(backbone, name)
            if ours != theirs:
                raise AdapterError(f"{name}: the adapter was trained for {ours!r}, the model has {theirs!r}.")
        for name in ("base_model", "base_revision"):
            ours, theirs = getattr(self.backbone, name), getattr(backbone, name)
            if ours is not None and theirs is not None and ours != theirs:
                warnings.warn(
                    f"{name}: the adapter was trained for {ours!r}, the model is {theirs!r}. It fits, but measure "
                    "what it does there, or load the backbone that it was trained for.",
                    stacklevel=3,
                )
                break

    def load_into(self, embedding: DecoupledEmbedding | None) -> None:
        """Copy the tensors into a model's embedding of the same shape. Raises AdapterError where it has none.

        What the adapter has no tensors for, as it was learned without, stays.
        """
        if embedding is None:
            raise AdapterError(
                f"method={self.config.method!r} learns nothing, so no model has a place for this adapter."
            )
        if embedding.embed_dim != self.embed_dim:
            raise AdapterError(
                f"embed_dim: the adapter has {self.embed_dim}, the model's embedding {embedding.embed_dim}."
            )
        own = embedding.adapter_tensors()
        for key, tensor in self.tensors.items():
            if key not in own or own[key].shape != tensor.shape:
                place = list(own[key].shape) if key in own else "no place for it"
                raise AdapterError(f"{key}: the adapter's is {list(tensor.shape)}, and the model has {place}.")
        embedding.load_adapter_tensors({**own, **self.tensors})

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **push_to_hub_kwargs: Any,
    ) -> CommitInfo | None:
        """Write config, tensors and card into a folder (made if needed); each file whole or not at all.

        A card that is there is kept. Other files are left alone. With `push_to_hub`, what of the folder belongs to the
        adapter is published (keywords are those of the method of that name), and the commit returned.
        """
        directory = Path(save_directory)
        self._save_pretrained(directory)
        if not (directory / CARD_NAME).exists():
            self.generate_model_card().save(directory / CARD_NAME)
        if push_to_hub:
            return publish_folder(directory, repo_id or directory.name, **push_to_hub_kwargs)
        return None

    def _save_pretrained(self, save_directory: Path) -> None:
        with replacing(save_directory / WEIGHTS_NAME) as temporary:
            save_file(self.tensors, temporary, metadata={"format": "pt"})
        write_json(save_directory / CONFIG_NAME, {**self.config.to_dict(), "backbone": asdict(self.backbone)})

    def generate_model_card(self, **kwargs: Any) -> ModelCard:
        """The card of an adapter about which nothing more is known (keywords are `card_of`'s)."""
        return card_of(self.config, self.backbone, **{"evaluation": None, **kwargs})

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> CommitInfo:
        """Publish the adapter in one commit, in a repository that is made if needed. Returns the commit.

        `private`: make it private (refused where a public repository is there). `branch` or `revision`: commit to
        that branch, made if needed. `create_pr`: propose the commit. `commit_message`, `token`: the client's own.
        `overwrite_card`: replace a README.md that is there. Raises what `dtem_hf.hub.publish` does.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return publish_folder(folder, repo_id, **kwargs)

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

        Raises FileNotFoundError where there is none, PermissionError where it may not be had, and AdapterError (a
        ValueError) where it is not sound. The backbone is not downloaded.
        """
        return cls._from_pretrained(
            model_id=os.fspath(pretrained_model_name_or_path),
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )

    @classmethod
    def _from_pretrained(cls, *, model_id: str, revision: str | None = None, **options: Any) -> MergeAdapter:
        if os.path.isdir(model_id):
            config, backbone = _read_config(Path(model_id) / CONFIG_NAME, model_id)
            weights = Path(model_id) / WEIGHTS_NAME
            if not weights.is_file():
                raise FileNotFoundError(f"there is no {WEIGHTS_NAME} in {model_id}")
        else:
            path, commit = download(model_id, CONFIG_NAME, LARGEST_JSON, revision, **options)
            config, backbone = _read_config(path, model_id)
            # Of the same commit, whatever is pushed in between.
            weights, _ = download(model_id, WEIGHTS_NAME, _largest_weights(config, backbone), commit, **options)
        return cls(config, _read_tensors(weights, config, backbone), backbone)

    @classmethod
    def from_reference(cls, reference: str | os.PathLike[str], **hub_kwargs: Any) -> MergeAdapter:
        """Read what `merge=` may name: a folder, `user/repo`, or `user/repo@revision`."""
        name, revision = split_reference(reference)
        pinned: dict[str, Any] = {} if revision is None else {"revision": revision}
        return cls.from_pretrained(name, **pinned, **hub_kwargs)


def split_reference(reference: str | os.PathLike[str]) -> tuple[str, str | None]:
    """A folder or a Hub id, and the revision that `user/repo@revision` pins."""
    pinned = None
    if isinstance(reference, str) and not os.path.isdir(reference):
        pinned = re.fullmatch(r"([^@]+)@([^@]+)", reference)
    return (pinned[1], pinned[2]) if pinned else (os.fspath(reference), None)


def _read_config(path: Path, name: str) -> tuple[MergeConfig, BackboneFacts]:
    try:
        values = read_json(path)
        if not isinstance(values, dict):
            raise BadValue(CONFIG_NAME, values, "a JSON object")
        # First, as everything else may be different in another version.
        check_version(values.pop("version", None))
        backbone = BackboneFacts.from_dict(values.pop("backbone", None))
        return MergeConfig.from_dict(values), backbone
    except BadValue as error:
        raise AdapterError(f"{name}: in {CONFIG_NAME}, {error}") from error


def _largest_weights(config: MergeConfig, backbone: BackboneFacts) -> int:
    """The most bytes that tensors of a config can take in a file; an embedding is no wider than its backbone."""
    width = getattr(config, "embed_dim", None) or backbone.hidden_size
    # An embedding, exponents of at most `hidden_size` heads, and one number for lengths.
    numbers = backbone.num_layers * ((width + 1) * (backbone.hidden_size + 1))
    return min(_LARGEST_HEADER + 4 * numbers, _LARGEST_WEIGHTS)


def _read_tensors(path: Path, config: MergeConfig, backbone: BackboneFacts) -> dict[str, Tensor]:
    """Read an adapter's tensors, whose names, shapes and dtype are checked before anything is allocated."""
    tensors = {}
    try:
        _check_sizes(path, _largest_weights(config, backbone))
        with safe_open(path, framework="pt") as file:
            _check_header(file, path.name, config, backbone)
            for key in file.keys():  # noqa: SIM118  # no dict
                # A copy: the file is mapped, and what is done to it later must not reach the adapter.
                tensors[key] = file.get_tensor(key).clone()
                if not tensors[key].isfinite().all():
                    raise AdapterError(f"{path.name}: {key} holds NaN or infinity.")
    except (SafetensorError, OSError) as error:
        # What it quotes of the file is a stranger's.
        raise AdapterError(f"{path.name} is not a readable safetensors file: {clean(error)[:200]}.") from error
    return dict(sorted(tensors.items()))


def _check_sizes(path: Path, largest: int) -> None:
    """Raise AdapterError where a file is too large for its config, or the header that it announces for any."""
    size = path.stat().st_size
    if size > largest:
        raise AdapterError(f"{path.name} has {size} bytes, and its config calls for {largest} at most.")
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > _LARGEST_HEADER:
        raise AdapterError(
            f"{path.name} is not a readable safetensors file: a header of {length} bytes, "
            f"and {_LARGEST_HEADER} are the most."
        )


def _check_header(file: Any, filename: str, config: MergeConfig, backbone: BackboneFacts) -> None:
    """Raise AdapterError for the first name, shape or dtype that is not what the config says."""
    names = set(file.keys())
    # Not in every config: the width, which may be that of a head, and how many heads there are.
    embed_dim = getattr(config, "embed_dim", None) or _length(file, names, "layers.0.bias", most=1 << 20)
    heads = 0
    if getattr(config, "learn_exponents", False):
        heads = _length(file, names, "exponents.0", most=backbone.hidden_size)
    norms = getattr(config, "learn_norms", False)
    expected = EmbeddingShape(backbone.num_layers, backbone.hidden_size, embed_dim, heads, norms).tensors()
    if names != set(expected):
        odd = min(names ^ set(expected))
        raise AdapterError(
            f"{filename}: its tensors are not those of {backbone.num_layers} layers; first difference: {odd[:200]!r}."
        )
    for key, shape in sorted(expected.items()):
        part = file.get_slice(key)
        if part.get_shape() != shape or part.get_dtype() != "F32":
            raise AdapterError(
                f"{filename}: {key} is {part.get_dtype()} {part.get_shape()}, and F32 {shape} would fit its config."
            )


def _length(file: Any, names: set[str], key: str, most: int) -> int:
    """The length of a vector in a file, where nothing else says it; 1 where there is none to read it off."""
    shape = file.get_slice(key).get_shape() if key in names else []
    return min(max(shape[0], 1), most) if shape else 1
