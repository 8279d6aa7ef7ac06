"""Files are written whole or not at all, and JSON is read within bounds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dtem_hf.errors import BadValue
from dtem_hf.files import read_json, replacing, replacing_together, write_json, write_text


def test_a_write_that_fails_half_way_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_text(tmp_path / "card.md", "old")
    with pytest.raises(RuntimeError, match="disk on fire"), replacing(tmp_path / "card.md") as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError("disk on fire")
    assert (tmp_path / "card.md").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["card.md"]


def test_a_target_that_cannot_be_replaced_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "card.md").mkdir()
    with pytest.raises(OSError):
        write_text(tmp_path / "card.md", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["card.md"]


def test_the_old_file_is_there_until_the_new_one_is_complete(tmp_path: Path) -> None:
    write_text(tmp_path / "card.md", "old")
    with replacing(tmp_path / "card.md") as temporary:
        temporary.write_text("new")
        assert (tmp_path / "card.md").read_text() == "old"
    assert (tmp_path / "card.md").read_text() == "new"


def test_folders_are_made_and_the_file_has_the_usual_permissions(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b" / "card.md", "größer")
    (tmp_path / "plain").touch()
    written = tmp_path / "a" / "b" / "card.md"
    assert written.read_bytes() == "größer".encode()
    assert os.stat(written).st_mode == os.stat(tmp_path / "plain").st_mode


def test_json_comes_back(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None, True], "b": {"c": "größer"}}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}], ids=repr)
def test_what_json_has_no_word_for_is_not_written(tmp_path: Path, value: object) -> None:
    write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises((TypeError, ValueError)):
        write_json(tmp_path / "x.json", {"a": value})
    assert read_json(tmp_path / "x.json") == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"a": 1', b"\xff\xfe\x00", b"[" * 200_000],
    ids=["empty", "brace", "truncated", "not UTF-8", "nested without end"],
)
def test_what_is_no_json_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(BadValue, match=r"x\.json"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize("opening, closing", [("[", "]"), ('{"a": ', "}")])
def test_json_is_read_to_a_depth_and_no_further(tmp_path: Path, opening: str, closing: str) -> None:
    (tmp_path / "x.json").write_text(opening * 64 + "1" + closing * 64)
    value = read_json(tmp_path / "x.json")
    for _ in range(64):
        value = value[0] if isinstance(value, list) else value["a"]
    assert value == 1
    (tmp_path / "x.json").write_text(opening * 65 + "1" + closing * 65)
    with pytest.raises(BadValue, match="at most 64 levels"):
        read_json(tmp_path / "x.json")


def test_json_beyond_a_megabyte_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b" " * (1 << 20) + b"1")
    with pytest.raises(BadValue, match="at most 1048576 bytes"):
        read_json(tmp_path / "x.json")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"x\.json"):
        read_json(tmp_path / "x.json")


def test_files_that_belong_together_come_together_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("old")
    with pytest.raises(RuntimeError, match="disk on fire"), replacing_together(tmp_path) as staging:
        (staging / "model.onnx").write_text("new")
        raise RuntimeError("disk on fire")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"model.onnx": "old"}
    with replacing_together(tmp_path) as staging:
        (staging / "model.onnx").write_text("new")
        (staging / "model.onnx.json").write_text("{}")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "model.onnx": "new",
        "model.onnx.json": "{}",
    }
