"""Adapters that are damaged, hostile, too new or for something else: each is refused by the name of what is wrong."""

from __future__ import annotations

import hashlib
import json
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dtem_hf import (
    AdapterError,
    AutoModelForImageClassification,
    DTEMConfig,
    LinearSchedule,
    MergeAdapter,
    ToMeConfig,
    attach,
)
from dtem_hf.configuration import CONFIG_NAME
from dtem_hf.hub.layout import WEIGHTS_NAME
from tests.support.adapters import edit_config, edit_tensors


Make = Callable[..., Any]


@pytest.fixture
def model(make_classifier: Make) -> Any:
    """A small classifier whose DTEM is no longer where it started."""
    model = attach(make_classifier(), DTEMConfig(r=LinearSchedule(9), top_k=2))
    for parameter in model.merge_parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture
def folder(model: Any, tmp_path: Path) -> Path:
    """Its adapter."""
    model.save_merge_adapter(tmp_path / "adapter", base_model="google/vit-tiny")
    return tmp_path / "adapter"


def header(tensors: dict[str, Any]) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 7,
        b"not a safetensors file, but long enough to look at",
        struct.pack("<Q", 1 << 62) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        header({"layers.0.weight": {"dtype": "F32", "shape": [8, 32], "data_offsets": [0, 1 << 40]}}),
        header({"layers.0.weight": {"dtype": "F99", "shape": [8, 32], "data_offsets": [0, 1024]}}) + b"\x00" * 1024,
        b"\x80\x04}q\x00.",
    ],
    ids=["empty", "short", "text", "header without end", "list", "offsets past the end", "unknown dtype", "pickle"],
)
def test_what_is_no_safetensors_file_is_refused_by_name(folder: Path, content: bytes) -> None:
    (folder / WEIGHTS_NAME).write_bytes(content)
    with pytest.raises(AdapterError, match=WEIGHTS_NAME):
        MergeAdapter.from_pretrained(folder)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.999])
def test_a_truncated_file_is_refused(folder: Path, share: float) -> None:
    content = (folder / WEIGHTS_NAME).read_bytes()
    (folder / WEIGHTS_NAME).write_bytes(content[: int(len(content) * share)])
    with pytest.raises(AdapterError, match=WEIGHTS_NAME):
        MergeAdapter.from_pretrained(folder)


def rename(tensors: dict[str, Tensor]) -> None:
    tensors["blocks.3.weight"] = tensors.pop("layers.3.weight")


@pytest.mark.parametrize(
    "edit, message",
    [
        (rename, "blocks.3.weight"),
        (lambda t: t.pop("layers.2.bias"), "layers.2.bias"),
        (lambda t: t.update({"layers.4.weight": torch.zeros(8, 32)}), "layers.4.weight"),
        (lambda t: t.update({"layers.1.weight": t["layers.1.weight"].half()}), "layers.1.weight is F16"),
        (lambda t: t.update({"layers.1.bias": t["layers.1.bias"].double()}), "layers.1.bias is F64"),
        (lambda t: t.update({"layers.1.weight": torch.zeros(32, 8)}), "layers.1.weight is F32 [32, 8]"),
        (lambda t: t.update({"layers.0.bias": torch.zeros(())}), WEIGHTS_NAME),
        (lambda t: t.update({"layers.0.bias": torch.zeros(9)}), "layers.0."),
        (lambda t: t["layers.3.weight"].view(-1)[7].fill_(float("nan")), "layers.3.weight holds NaN"),
        (lambda t: t["layers.3.bias"][0].fill_(float("inf")), "layers.3.bias holds NaN or infinity"),
    ],
    ids=["renamed", "lost", "too many", "half", "double", "transposed", "scalar", "other width", "NaN", "infinity"],
)
def test_tensors_that_do_not_fit_the_config_are_refused_by_name(
    folder: Path, edit: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    edit_tensors(folder, edit)
    with pytest.raises(AdapterError) as raised:
        MergeAdapter.from_pretrained(folder)
    assert message in str(raised.value)


def test_tensors_narrower_than_the_config_says_are_refused(folder: Path) -> None:
    edit_config(folder, lambda values: values.update(embed_dim=16))
    with pytest.raises(AdapterError, match=r"F32 \[8\], and its config needs F32 \[16\]"):
        MergeAdapter.from_pretrained(folder)


def test_an_embedding_of_no_width_is_refused(folder: Path, make_classifier: Make) -> None:
    edit_tensors(folder, lambda t: t.update({key: t[key][:0].clone() for key in t}))
    with pytest.raises(AdapterError):
        attach(make_classifier(), folder)


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda v: v.pop("backbone"), "backbone=None"),
        (lambda v: v.update(backbone=[1]), "backbone=[1]"),
        (lambda v: v["backbone"].pop("model_type"), "backbone.model_type=None"),
        (lambda v: v["backbone"].update(num_layers=0), "backbone.num_layers=0"),
        (lambda v: v["backbone"].update(num_layers="4"), "backbone.num_layers='4'"),
        (lambda v: v["backbone"].update(num_layers=1 << 40), "backbone.num_layers="),
        (lambda v: v["backbone"].update(num_layers=4096), "4096 layers"),
        (lambda v: v["backbone"].update(hidden_size=True), "backbone.hidden_size=True"),
        (lambda v: v["backbone"].update(hidden_size=16), "its config needs F32 [8, 16]"),
        (lambda v: v["backbone"].update(base_model=7), "backbone.base_model=7"),
        (lambda v: v.update(version="2.0"), "version='2.0'"),
        (lambda v: v.update(method="evitt"), "method='evitt'"),
        (lambda v: v.update(r=-1), "r=-1"),
        (lambda v: v.update(embed_dim=0), "embed_dim=0"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused_by_field(
    folder: Path, edit: Callable[[dict[str, Any]], Any], message: str
) -> None:
    edit_config(folder, edit)
    with pytest.raises(ValueError) as raised:
        MergeAdapter.from_pretrained(folder)
    assert message in str(raised.value)


@pytest.mark.parametrize("content", ["[]", "3", "null", "{", ""])
def test_a_config_that_is_no_object_is_refused(folder: Path, content: str) -> None:
    (folder / CONFIG_NAME).write_text(content)
    with pytest.raises(ValueError, match=CONFIG_NAME):
        MergeAdapter.from_pretrained(folder)


def test_a_config_of_a_newer_minor_version_is_read_with_warnings(folder: Path, model: Any, pixels: Tensor) -> None:
    edit_config(folder, lambda values: values.update(version="1.9", sharpness=3))
    with pytest.warns(UserWarning) as caught:
        adapter = MergeAdapter.from_pretrained(folder)
    messages = " ".join(str(warning.message) for warning in caught)
    assert "1.9" in messages
    assert "sharpness" in messages
    assert adapter.config == model.merge_config


def test_a_sound_folder_is_read_without_a_warning(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter = MergeAdapter.from_pretrained(folder)
    assert adapter.tensors


def test_tensors_for_a_method_that_learns_nothing_are_refused(
    folder: Path, make_classifier: Make, pixels: Tensor, tmp_path: Path
) -> None:
    """A config edited to say "tome" beside an embedding: an AdapterError, and an unchanged model."""
    (folder / CONFIG_NAME).write_text(
        json.dumps(
            {**ToMeConfig(r=4).to_dict(), "backbone": {"model_type": "vit", "num_layers": 4, "hidden_size": 32}}
        )
    )
    model = make_classifier()
    with torch.no_grad():
        before = model(pixels).logits
    with pytest.raises(AdapterError, match="learns nothing"):
        attach(model, folder)
    with torch.no_grad():
        assert torch.equal(model(pixels).logits, before)
    assert not hasattr(model, "merge_config")
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(AdapterError, match="learns nothing"):
        AutoModelForImageClassification.from_pretrained(tmp_path / "base", merge=folder)


def test_a_newer_major_version_is_refused_with_the_version_needed_whatever_else_is_new(folder: Path) -> None:
    edit_config(folder, lambda values: values.update(version="3.1", method="better", backbone="elsewhere"))
    with pytest.raises(AdapterError, match=r"version='3\.1'.*reads formats up to 1\.x.*reads format 3\.1"):
        MergeAdapter.from_pretrained(folder)


def test_a_file_that_is_too_large_for_its_config_is_not_read(folder: Path) -> None:
    with open(folder / WEIGHTS_NAME, "ab") as file:
        file.truncate(1 << 32)  # nothing on the disk, and 4 GiB to who reads it
    with pytest.raises(AdapterError, match=r"merge_adapter\.safetensors='4294967296 bytes': a file of at most"):
        MergeAdapter.from_pretrained(folder)


def test_a_header_that_is_too_large_is_not_read(folder: Path) -> None:
    content = header({"__metadata__": {"x": "y" * (1 << 20)}})
    (folder / WEIGHTS_NAME).write_bytes(content)
    with pytest.raises(AdapterError, match=r"its header has .* bytes, and may have 1048576 at most"):
        MergeAdapter.from_pretrained(folder)


def damage(folder: Path) -> None:
    """Another finite number in the place of the last one: a file as sound as before."""
    content = (folder / WEIGHTS_NAME).read_bytes()
    (folder / WEIGHTS_NAME).write_bytes(content[:-4] + struct.pack("<f", 1.0))


def test_damaged_tensors_are_refused_by_their_digest(folder: Path, make_classifier: Make) -> None:
    recorded = json.loads((folder / CONFIG_NAME).read_text())["tensors_sha256"]
    damage(folder)
    found = hashlib.sha256((folder / WEIGHTS_NAME).read_bytes()).hexdigest()
    with pytest.raises(AdapterError, match=rf"{WEIGHTS_NAME} is not the file.*{found}, and {recorded} is recorded"):
        MergeAdapter.from_pretrained(folder)
    with pytest.raises(AdapterError, match="SHA-256"):
        attach(make_classifier(), folder)


@pytest.mark.parametrize("edit", [lambda v: v.pop("tensors_sha256"), lambda v: v.update(tensors_sha256=None)])
def test_an_adapter_without_a_digest_loads(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    edit_config(folder, edit)
    damage(folder)
    assert MergeAdapter.from_pretrained(folder).tensors["layers.3.weight"][-1, -1] == 1.0


@pytest.mark.parametrize("digest", ["", "0" * 63, "X" * 64, 3, ["0" * 64], "0" * 65])
def test_a_digest_that_is_none_is_named(folder: Path, digest: Any) -> None:
    edit_config(folder, lambda values: values.update(tensors_sha256=digest))
    with pytest.raises(AdapterError, match="tensors_sha256="):
        MergeAdapter.from_pretrained(folder)


@pytest.mark.parametrize("number", [10**400, -1, 0.5, True, float("inf")], ids=str)
@pytest.mark.parametrize("name", ["num_layers", "hidden_size"])
def test_numbers_of_the_backbone_are_bounded(folder: Path, name: str, number: Any) -> None:
    edit_config(folder, lambda values: values["backbone"].update({name: number}))
    with pytest.raises(AdapterError, match=rf"backbone\.{name}="):
        MergeAdapter.from_pretrained(folder)


def test_the_error_of_a_hostile_file_is_short_and_printable(folder: Path) -> None:
    edit_config(folder, lambda values: values.update({"\x1b[31m" + "x" * 5000: 1, "method": "\x1b[2J" * 100}))
    with pytest.raises(AdapterError) as raised:
        MergeAdapter.from_pretrained(folder)
    assert str(raised.value).isprintable() and len(str(raised.value)) < 600


def test_the_warning_of_many_unknown_keys_is_short_and_printable(folder: Path) -> None:
    edit_config(folder, lambda values: values.update({f"\x1b[31m{i}" + "x" * 500: 1 for i in range(1000)}))
    with pytest.warns(UserWarning, match="and 995 more") as caught:
        MergeAdapter.from_pretrained(folder)
    assert all(str(warning.message).isprintable() and len(str(warning.message)) < 800 for warning in caught)
