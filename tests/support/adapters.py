"""Adapters that the tests of the Hub publish and load, and the functions that the client's process calls."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dtem_hf import DTEMConfig, MergeAdapter
from dtem_hf.configuration import CONFIG_NAME
from dtem_hf.hub.facts import BackboneFacts
from dtem_hf.hub.layout import WEIGHTS_NAME


CLIENT = "tests.support.hub_client"
LOAD = "dtem_hf:MergeAdapter.from_pretrained"
PUBLISH = "dtem_hf.hub.publishing:publish_folder"
ME = {"token": "hf_me"}
PUBLISHED = {"README.md", "config.json", CONFIG_NAME, WEIGHTS_NAME}


def make_adapter(seed: int = 0, **facts: Any) -> MergeAdapter:
    """An adapter for the backbone in `vit_folder`, of about 9 kB."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {f"layers.{i}.weight": torch.randn(16, 32, generator=draw) for i in range(4)}
    tensors |= {f"layers.{i}.bias": torch.randn(16, generator=draw) for i in range(4)}
    backbone = BackboneFacts(**{"model_type": "vit", "num_layers": 4, "hidden_size": 32, **facts})
    return MergeAdapter(DTEMConfig(r=2), tensors, backbone)


def assert_same(first: MergeAdapter, second: MergeAdapter) -> None:
    assert first.config == second.config and first.backbone == second.backbone
    assert first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(first.tensors[key], second.tensors[key]) for key in first.tensors)


def again(attempt: Callable[[], Any]) -> Any:
    """Newer clients try again by themselves where a connection was cut, older ones say what to do."""
    try:
        return attempt()
    except ConnectionError as error:
        assert "me/a: the connection to" in str(error) and "again" in str(error)
        return attempt()


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads((folder / CONFIG_NAME).read_text())
    edit(values)
    (folder / CONFIG_NAME).write_text(json.dumps(values))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS_NAME)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
