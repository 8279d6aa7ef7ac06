"""Adapters on disk: what is written, and every way in which what is read can be wrong."""

from __future__ import annotations

import hashlib
import json
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
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
from dtem_hf.hub.facts import BackboneFacts
from dtem_hf.hub.layout import WEIGHTS_NAME
from tests.support.adapters import edit_config
from tests.support.children import run_python
from tests.support.full_disk import full_disk


Make = Callable[..., Any]
KEYS = {f"layers.{i}.{part}" for i in range(4) for part in ("weight", "bias")}


def logits(model: Any, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return model(pixels).logits


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


def test_a_folder_holds_what_the_contract_says(folder: Path, model: Any) -> None:
    assert {path.name for path in folder.iterdir()} == {"merge_config.json", "merge_adapter.safetensors", "README.md"}
    tensors = load_file(folder / "merge_adapter.safetensors")
    assert set(tensors) == KEYS
    for i, layer in enumerate(model.vit.merge_embedding.projections):
        assert tensors[f"layers.{i}.weight"].shape == (8, 32)
        assert tensors[f"layers.{i}.bias"].shape == (8,)
        assert {tensors[f"layers.{i}.{part}"].dtype for part in ("weight", "bias")} == {torch.float32}
        assert torch.equal(tensors[f"layers.{i}.weight"], layer.weight)
        assert torch.equal(tensors[f"layers.{i}.bias"], layer.bias)
    config = json.loads((folder / "merge_config.json").read_text())
    backbone = config.pop("backbone")
    content = (folder / "merge_adapter.safetensors").read_bytes()
    assert config.pop("tensors_sha256") == hashlib.sha256(content).hexdigest()
    assert config == model.merge_config.to_dict()
    assert backbone == {
        "model_type": "vit",
        "num_layers": 4,
        "hidden_size": 32,
        "base_model": "google/vit-tiny",
        "base_revision": None,
    }


def test_what_is_read_is_what_was_written(folder: Path, model: Any, tmp_path: Path) -> None:
    adapter = MergeAdapter.from_pretrained(folder)
    assert adapter.config == model.merge_config
    assert adapter.embed_dim == 8
    assert adapter.backbone == BackboneFacts("vit", 4, 32, "google/vit-tiny", None)
    adapter.save_pretrained(tmp_path / "again")
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_a_low_precision_model_writes_float32_that_comes_back_to_it_bit_for_bit(
    make_classifier: Make, tmp_path: Path
) -> None:
    model = attach(make_classifier().bfloat16(), DTEMConfig(r=9))
    for parameter in model.merge_parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_merge_adapter(tmp_path)
    assert {value.dtype for value in load_file(tmp_path / WEIGHTS_NAME).values()} == {torch.float32}
    loaded = attach(make_classifier().bfloat16(), tmp_path)
    for ours, theirs in zip(loaded.merge_parameters(), model.merge_parameters(), strict=True):
        assert ours.dtype == torch.bfloat16
        assert torch.equal(ours, theirs)


def test_an_adapter_of_another_width_of_embedding_says_so_itself(make_classifier: Make, tmp_path: Path) -> None:
    """Its config carries embed_dim, so it attaches wherever the backbone fits."""
    model = attach(make_classifier(), DTEMConfig(r=9, embed_dim=24, init="random"))
    model.save_merge_adapter(tmp_path)
    loaded = attach(make_classifier(), tmp_path)
    assert [p.shape for p in loaded.merge_parameters()] == [p.shape for p in model.merge_parameters()]


def test_a_local_folder_is_not_recorded_as_the_backbone(make_classifier: Make, tmp_path: Path) -> None:
    """A path means nothing on another machine, and may be private."""
    make_classifier().save_pretrained(tmp_path / "base")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "base", merge=DTEMConfig(r=4))
    model.save_merge_adapter(tmp_path / "adapter")
    assert MergeAdapter.from_pretrained(tmp_path / "adapter").backbone.base_model is None
    for file in (CONFIG_NAME, "README.md"):
        assert str(tmp_path) not in (tmp_path / "adapter" / file).read_text()


def test_a_method_that_learns_nothing_has_no_adapter(make_classifier: Make, tmp_path: Path) -> None:
    model = attach(make_classifier(), ToMeConfig(r=4))
    with pytest.raises(AdapterError, match="method='tome' learns nothing"):
        model.save_merge_adapter(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_other_files_and_a_card_of_ones_own_are_kept(folder: Path, model: Any) -> None:
    (folder / "README.md").write_text("mine")
    (folder / "notes.txt").write_text("also mine")
    with pytest.warns(UserWarning, match="was edited and is kept"):
        model.save_merge_adapter(folder)
    assert (folder / "README.md").read_text() == "mine"
    assert (folder / "notes.txt").read_text() == "also mine"


@pytest.mark.parametrize("failure", ["tensors", "config"])
def test_a_failing_write_leaves_the_old_file_and_nothing_temporary(folder: Path, failure: str) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    adapter = MergeAdapter.from_pretrained(folder)
    if failure == "tensors":
        adapter.tensors["layers.3.weight"] = torch.zeros(32, 8).T  # safetensors refuses what is not contiguous
    else:
        adapter.backbone = BackboneFacts("vit", 4, 32, base_model={"not", "JSON"})  # type: ignore[arg-type]
    with pytest.raises((ValueError, TypeError)):
        adapter.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_that_cannot_be_made_is_an_error(model: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError):
        model.save_merge_adapter(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden_size": 64}, "hidden_size: the adapter was trained for 32, the model has 64"),
        ({"num_hidden_layers": 6}, "num_layers: the adapter was trained for 4, the model has 6"),
    ],
    ids=str,
)
def test_another_backbone_is_told_which_number_differs(
    folder: Path, make_classifier: Make, tmp_path: Path, changes: dict[str, int], message: str
) -> None:
    model = make_classifier(**changes)
    with pytest.raises(AdapterError) as raised:
        attach(model, folder)
    assert message in str(raised.value)
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(AdapterError) as raised:
        AutoModelForImageClassification.from_pretrained(tmp_path / "base", merge=folder)
    assert message in str(raised.value)


def test_another_model_type_is_told(folder: Path, make_classifier: Make) -> None:
    edit_config(folder, lambda values: values["backbone"].update(model_type="dinov2"))
    with pytest.raises(AdapterError, match="model_type: the adapter was trained for 'dinov2', the model has 'vit'"):
        attach(make_classifier(), folder)


def test_another_number_of_heads_is_told(folder: Path, make_classifier: Make) -> None:
    """The same width in other heads gives the embedding another width."""
    with pytest.raises(AdapterError, match="embed_dim: the adapter has 8, the model's embedding 16"):
        attach(make_classifier(num_attention_heads=2), folder)


def test_a_list_of_r_for_another_depth_is_told(folder: Path, make_classifier: Make) -> None:
    edit_config(folder, lambda values: values.update(r=[1, 2]))
    with pytest.raises(ValueError, match="2 layers and the model has 4"):
        attach(make_classifier(), folder)


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        MergeAdapter.from_pretrained(folder)


@pytest.mark.parametrize("name", ["no/such/folder/here", "./nowhere", "", "a b", "user/repo/extra@main"])
def test_what_is_neither_folder_nor_hub_id_is_not_found(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError):
        MergeAdapter.from_reference(name)


def test_what_is_not_in_the_cache_is_not_found_without_asking_the_hub(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        MergeAdapter.from_pretrained("user/repo", local_files_only=True, cache_dir=tmp_path)


def test_a_folder_whose_name_has_an_at_sign_is_a_folder(folder: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(folder.parent)
    folder.rename(folder.parent / "adapter@v2")
    assert MergeAdapter.from_reference("adapter@v2").embed_dim == 8


KILLED = """
import os, signal, sys
from dtem_hf import MergeAdapter

old, new = (MergeAdapter.from_pretrained(folder) for folder in sys.argv[1:3])
for number in range(10):  # each child is killed at another of its renames; the last one has none left
    old.save_pretrained(sys.argv[3])
    child = os.fork()
    if not child:
        renames = iter(range(number))
        def hook(event, _):
            if event == "os.rename" and next(renames, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        new.save_pretrained(sys.argv[3])
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    read = MergeAdapter.from_pretrained(sys.argv[3])
    value = read.tensors["layers.0.bias"][0].item()
    print(status, value == new.tensors["layers.0.bias"][0].item(), value == old.tensors["layers.0.bias"][0].item())
"""


def test_an_adapter_can_be_read_whenever_its_writer_is_killed(folder: Path, model: Any, tmp_path: Path) -> None:
    """Config and tensors are two files, and neither must name the other's content while one of them is older."""
    for parameter in model.merge_parameters():
        parameter.data += 1
    model.save_merge_adapter(tmp_path / "new", base_model="google/vit-tiny")
    done = run_python(["-c", KILLED, folder, tmp_path / "new", tmp_path / "written"], check=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    killed = [line[1:] for line in lines if line[0] == str(-signal.SIGKILL)]
    assert len(lines) == 10 and 3 <= len(killed) < 10 and lines[-1] == ["0", "True", "False"]
    assert killed[0] == ["False", "True"] and killed[-1] == ["True", "False"] and ["False", "False"] not in killed


def test_a_full_disk_leaves_the_adapter_that_was_there(folder: Path, make_classifier: Make) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    wide = attach(make_classifier(), DTEMConfig(r=9, embed_dim=24, init="random"))
    with full_disk(), pytest.raises(OSError) as raised:
        wide.save_merge_adapter(folder)
    assert raised.value.filename == str(folder / WEIGHTS_NAME) and len(str(raised.value).splitlines()) == 1
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_what_is_done_to_the_file_later_does_not_reach_the_adapter(folder: Path) -> None:
    before = MergeAdapter.from_pretrained(folder)
    expected = {key: tensor.clone() for key, tensor in before.tensors.items()}
    with open(folder / WEIGHTS_NAME, "r+b") as file:  # in place, as cp does it
        content = file.read()
        file.seek(0)
        file.write(b"\xff" * len(content))
    assert all(torch.equal(before.tensors[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("recorded", "loaded", "message"),
    [
        (("a/b", "1"), ("a/b", "2"), "base_revision: the adapter was trained for '1', the model is '2'"),
        (("a/b", "1"), ("a/c", "1"), "base_model: the adapter was trained for 'a/b', the model is 'a/c'"),
        (("a/b", "1"), ("a/b", "1"), None),
        (("a/b", "1"), ("a/b", None), None),
        (("a/b", "1"), (None, None), None),
        ((None, None), ("a/b", "1"), None),
    ],
)
def test_another_backbone_that_fits_gives_one_warning(recorded: Any, loaded: Any, message: str | None) -> None:
    adapter = MergeAdapter(DTEMConfig(), {}, BackboneFacts("vit", 4, 32, *recorded))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapter.check_fits(BackboneFacts("vit", 4, 32, *loaded))
    assert [str(warning.message).split(". ")[0] for warning in caught] == ([message] if message else [])


def test_an_adapter_given_as_a_model_says_what_it_is(folder: Path) -> None:
    with pytest.raises(AdapterError, match=r"is a merge adapter for google/vit-tiny \(vit\) and no model"):
        AutoModelForImageClassification.from_pretrained(folder)


def test_what_is_neither_model_nor_adapter_keeps_the_error_of_transformers(tmp_path: Path) -> None:
    (tmp_path / "nothing.txt").write_text("")
    with pytest.raises((OSError, ValueError), match=r"config\.json"):
        AutoModelForImageClassification.from_pretrained(tmp_path)
