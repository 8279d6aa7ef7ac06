"""A merge adapter: the learned embedding of one backbone, as a folder or a Hub repository of about a megabyte.

A repository holds `merge_config.json`, `merge_adapter.safetensors` and `README.md`; loading reads only the first two.
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
from huggingface_hub import CommitInfo, ModelHubMixin
from safetensors.torch import save
from torch import Tensor

from ..configuration import CONFIG_NAME, MergeConfig
from ..embedding import DecoupledEmbedding
from ..errors import AdapterError
from ..files import replacing, write_json
from .facts import BackboneFacts
from .folder_card import refreshed_card
from .layout import WEIGHTS_NAME
from .publishing import publish_folder
from .reading import read_adapter, split_reference, tensors_digest


class MergeAdapter(ModelHubMixin, library_name="dtem-hf", tags=["token-merging"], license="apache-2.0"):
    """A method's config, its learned tensors, and facts about the backbone that they were trained for.

    `tensors` are float32: `layers.{i}.weight` [d', D] and `layers.{i}.bias` [d'], and the other parameters of
    `DecoupledEmbedding` that the config asks for, named by `EmbeddingShape.tensors`.
    """

    def __init__(self, config: MergeConfig, tensors: dict[str, Tensor], backbone: BackboneFacts) -> None:
        self.config = config
        self.backbone = backbone
        self.tensors = tensors

    @classmethod
    def from_embedding(
        cls, config: MergeConfig, embedding: DecoupledEmbedding | None, backbone: BackboneFacts
    ) -> MergeAdapter:
        """Copy the learned embedding of a merged model, in float32. Raises AdapterError if there is none."""
        if embedding is None:
            raise AdapterError(
                f"method={config.method!r} learns nothing, so there is no adapter. Save or publish the merged model "
                "with its own save_pretrained or push_to_hub, or attach method 'dtem', which learns."
            )
        return cls(config, embedding.adapter_values(), backbone)

    @property
    def embed_dim(self) -> int:
        """Width d' of the embedding; 0 for a method that learns scores instead (dTPS)."""
        return self.tensors["layers.0.weight"].shape[0] if "layers.0.weight" in self.tensors else 0

    def check_fits(self, backbone: BackboneFacts) -> None:
        """Raise AdapterError if type, depth or width of a backbone differ from those that the adapter was trained for.

        Warns if these are the same, but the backbone is known to be another model, or another commit.
        """
        for name in ("model_type", "num_layers", "hidden_size"):
            trained, found = getattr(self.backbone, name), getattr(backbone, name)
            if trained != found:
                raise AdapterError(f"{name}: the adapter was trained for {trained!r}, the model has {found!r}.")
        for name in ("base_model", "base_revision"):
            trained, found = getattr(self.backbone, name), getattr(backbone, name)
            if trained is not None and found is not None and trained != found:
                warnings.warn(
                    f"{name}: the adapter was trained for {trained!r}, the model is {found!r}. The shapes fit, but "
                    "measure the accuracy, or load the backbone that the adapter was trained for.",
                    stacklevel=3,
                )
                break

    def load_into(self, embedding: DecoupledEmbedding | None) -> None:
        """Copy the tensors into a model's embedding; parameters without a tensor in the adapter keep their values.

        Raises AdapterError if the embedding lacks one of the tensors, or has it in another shape.
        """
        if embedding is None:
            raise AdapterError(
                f"method={self.config.method!r} learns nothing, so a model cannot load this adapter's tensors."
            )
        if embedding.shape.embed_dim != self.embed_dim:
            raise AdapterError(
                f"embed_dim: the adapter has {self.embed_dim}, the model's embedding {embedding.shape.embed_dim}."
            )
        own = embedding.adapter_tensors()
        for key, tensor in self.tensors.items():
            if key not in own or own[key].shape != tensor.shape:
                place = list(own[key].shape) if key in own else "no such tensor"
                raise AdapterError(f"{key}: the adapter has {list(tensor.shape)}, the model {place}.")
        lacking = sorted(key for key in own.keys() - self.tensors.keys() if key.startswith("shifts."))
        if lacking and getattr(self.config, "learn_shifts", False):
            raise AdapterError(f"{lacking[0]}: the model has this parameter, and the adapter has no shift for it.")
        embedding.load_adapter_tensors({**own, **self.tensors})

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **push_to_hub_kwargs: Any,
    ) -> CommitInfo | None:
        """Write config, tensors and card into a folder, which is made if needed; each file is written atomically.

        Other files do not change. A card that was edited stays, with a warning. With `push_to_hub`, the adapter is
        published (`push_to_hub_kwargs` go to the method `push_to_hub`), and the commit is returned.
        """
        directory = Path(save_directory)
        with refreshed_card(directory):
            self._save_pretrained(directory)
        if push_to_hub:
            return publish_folder(directory, repo_id or directory.name, **push_to_hub_kwargs)
        return None

    def _save_pretrained(self, save_directory: Path) -> None:
        config_path, weights_path = save_directory / CONFIG_NAME, save_directory / WEIGHTS_NAME
        # Make both anew, so that they are checked as at reading.
        backbone = BackboneFacts.from_dict(asdict(self.backbone))
        config = {**replace(self.config).to_dict(), "backbone": asdict(backbone)}
        content = save(self.tensors, metadata={"format": "pt"})
        with replacing(config_path) as new_config, replacing(weights_path) as new_weights:
            write_json(new_config, {**config, "tensors_sha256": tensors_digest(content)})
            new_weights.write_bytes(content)
            if weights_path.exists():
                # If the process is killed between the two files, a config without a digest keeps both readable.
                write_json(config_path, config)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> CommitInfo:
        """Publish the adapter in one commit; a missing repository is made. Returns the commit.

        `private`: make a private repository (an existing public one is refused). `branch` or `revision`: commit to
        this branch, which is made if needed. `create_pr`: propose the commit as a pull request. `overwrite_card`:
        replace an existing README.md. `commit_message` and `token` are as in huggingface_hub. Raises what
        `dtem_hf.hub.client.publish` raises.
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
        """Read an adapter from a folder or from the Hub, without its backbone.

        Raises FileNotFoundError if there is none, PermissionError if access is denied, and AdapterError (a ValueError)
        for an invalid adapter.
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
        """Read an adapter from a folder, `user/repo`, or `user/repo@revision`."""
        name, revision = split_reference(reference)
        pinned: dict[str, Any] = {} if revision is None else {"revision": revision}
        return cls.from_pretrained(name, **pinned, **hub_kwargs)


def mean_adapter(adapters: Sequence[MergeAdapter]) -> MergeAdapter:
    """The mean of adapters of one backbone, with the config of the first.

    Each tensor is the mean over the adapters that have it. Adapters that were trained from the same start average
    well. Raises AdapterError if shapes or backbones differ. Source: model soups, arXiv 2203.05482.
    """
    first, means = adapters[0], {}
    for other in adapters[1:]:
        first.check_fits(other.backbone)
    for key in dict.fromkeys(key for each in adapters for key in each.tensors):
        tensors = [each.tensors[key] for each in adapters if key in each.tensors]
        if len(shapes := {tuple(tensor.shape) for tensor in tensors}) > 1:
            raise AdapterError(f"{key}: only adapters of one shape have a mean; these have {sorted(shapes)}.")
        means[key] = torch.stack(tensors).mean(dim=0)
    return MergeAdapter(first.config, means, first.backbone)
