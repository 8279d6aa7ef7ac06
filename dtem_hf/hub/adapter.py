"""A merge adapter: the learned embedding of one backbone, as a folder or a Hub repository of about a megabyte.

A repository holds `merge_config.json`, `merge_adapter.safetensors` and `README.md`; only the first two are read.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import CommitInfo, ModelCard, ModelHubMixin
from safetensors.torch import save
from torch import Tensor

from ..configuration import CONFIG_NAME, MergeConfig
from ..embedding import DecoupledEmbedding
from ..errors import AdapterError
from ..files import replacing, write_json, write_text
from .card import card_of
from .facts import BackboneFacts
from .folder_card import marked
from .layout import CARD_NAME, WEIGHTS_NAME
from .publishing import publish_folder
from .reading import read_adapter, split_reference, tensors_digest


class MergeAdapter(ModelHubMixin, library_name="dtem-hf", tags=["token-merging"], license="apache-2.0"):
    """A method's config, its learned tensors, and the backbone they were learned for.

    `tensors`: `layers.{i}.weight` [d', D] and `layers.{i}.bias` [d'], float32, and the exponents, norms and shifts
    that `DecoupledEmbedding` has beside them where the config says so.
    """

    def __init__(self, config: MergeConfig, tensors: dict[str, Tensor], backbone: BackboneFacts) -> None:
        self.config = config
        self.backbone = backbone
        self.tensors = tensors

    @classmethod
    def from_embedding(
        cls, config: MergeConfig, embedding: DecoupledEmbedding | None, backbone: BackboneFacts
    ) -> MergeAdapter:
        """Copy the learned embedding of a merged model, in float32. Raises AdapterError where there is none."""
        if embedding is None:
            raise AdapterError(
                f"method={config.method!r} learns nothing, so there is no adapter: the merged model's own "
                "save_pretrained and push_to_hub save and publish it, or attach method 'dtem', which learns."
            )
        return cls(config, embedding.adapter_values(), backbone)

    @property
    def embed_dim(self) -> int:
        """Width d' of the embedding; 0 where scores are learned in its place."""
        return self.tensors["layers.0.weight"].shape[0] if "layers.0.weight" in self.tensors else 0

    def check_fits(self, backbone: BackboneFacts) -> None:
        """Raise AdapterError where type, depth or width of the backbone differ from those it was trained for.

        Warns where they fit, and the backbone is known to be another model, or another commit of the same one.
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
        """Copy the tensors into a model's embedding; parameters without a tensor in the adapter keep their values.

        Raises AdapterError where a tensor has no place of its shape.
        """
        if embedding is None:
            raise AdapterError(
                f"method={self.config.method!r} learns nothing, so no model has a place for this adapter."
            )
        if embedding.shape.embed_dim != self.embed_dim:
            raise AdapterError(
                f"embed_dim: the adapter has {self.embed_dim}, the model's embedding {embedding.shape.embed_dim}."
            )
        own = embedding.adapter_tensors()
        for key, tensor in self.tensors.items():
            if key not in own or own[key].shape != tensor.shape:
                place = list(own[key].shape) if key in own else "no place for it"
                raise AdapterError(f"{key}: the adapter's is {list(tensor.shape)}, and the model has {place}.")
        lacking = sorted(key for key in own.keys() - self.tensors.keys() if key.startswith("shifts."))
        if lacking and getattr(self.config, "learn_shifts", False):
            raise AdapterError(f"{lacking[0]}: the model has it, and the adapter does not say how it moves.")
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

        A card that is there is kept, and other files are left alone. With `push_to_hub`, the adapter's files are
        published (keywords are those of the method of that name), and the commit is returned.
        """
        directory = Path(save_directory)
        self._save_pretrained(directory)
        if not (directory / CARD_NAME).exists():
            write_text(directory / CARD_NAME, marked(self.generate_model_card()))
        if push_to_hub:
            return publish_folder(directory, repo_id or directory.name, **push_to_hub_kwargs)
        return None

    def _save_pretrained(self, save_directory: Path) -> None:
        config_path, weights_path = save_directory / CONFIG_NAME, save_directory / WEIGHTS_NAME
        # Both are checked as they are when the folder is read.
        backbone = BackboneFacts.from_dict(asdict(self.backbone))
        config = {**replace(self.config).to_dict(), "backbone": asdict(backbone)}
        content = save(self.tensors, metadata={"format": "pt"})
        with replacing(config_path) as new_config, replacing(weights_path) as new_weights:
            write_json(new_config, {**config, "tensors_sha256": tensors_digest(content)})
            new_weights.write_bytes(content)
            if weights_path.exists():
                # A process killed between the two files leaves them without a digest, and so still readable.
                write_json(config_path, config)

    def generate_model_card(self, **kwargs: Any) -> ModelCard:
        """The card of an adapter about which nothing more is known (keywords are `card_of`'s)."""
        return card_of(self.config, self.backbone, **{"evaluation": None, **kwargs})

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> CommitInfo:
        """Publish the adapter in one commit, in a repository that is made if needed. Returns the commit.

        `private`: make it private (refused where a public repository is there). `branch` or `revision`: commit to
        that branch, made if needed. `create_pr`: propose the commit. `commit_message`, `token`: the client's own.
        `overwrite_card`: replace a README.md that is there. Raises what `dtem_hf.hub.client.publish` does.
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
        """Read an adapter from a folder or from the Hub; its backbone is not downloaded.

        Raises FileNotFoundError where there is none, PermissionError where access is denied, and AdapterError (a
        ValueError) where it is not sound.
        """
        config, backbone, tensors = read_adapter(
            os.fspath(pretrained_model_name_or_path),
            revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        return cls(config, tensors, backbone)

    @classmethod
    def from_reference(cls, reference: str | os.PathLike[str], **hub_kwargs: Any) -> MergeAdapter:
        """Read an adapter by what `merge=` takes: a folder, `user/repo`, or `user/repo@revision`."""
        name, revision = split_reference(reference)
        pinned: dict[str, Any] = {} if revision is None else {"revision": revision}
        return cls.from_pretrained(name, **pinned, **hub_kwargs)


def mean_adapter(adapters: Sequence[MergeAdapter]) -> MergeAdapter:
    """Each tensor as the mean over those adapters of one backbone that have it, with the config of the first.

    Runs from one start average well. Raises AdapterError where shapes or backbones differ. Source: model soups,
    arXiv 2203.05482.
    """
    first, means = adapters[0], {}
    for other in adapters[1:]:
        first.check_fits(other.backbone)
    for key in dict.fromkeys(key for each in adapters for key in each.tensors):
        tensors = [each.tensors[key] for each in adapters if key in each.tensors]
        if len(shapes := {tuple(tensor.shape) for tensor in tensors}) > 1:
            raise AdapterError(f"{key}: adapters of one shape have a mean, and these have {sorted(shapes)}.")
        means[key] = torch.stack(tensors).mean(dim=0)
    return MergeAdapter(first.config, means, first.backbone)
