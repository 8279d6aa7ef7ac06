"""Files are written whole or not at all, and JSON is read within bounds."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dtem_hf.errors import BadValue
from dtem_hf.files import (
    read_bytes,
    read_json,
    read_text,
    remove_leftovers,
    replacing,
    replacing_folder,
    replacing_together,
    write_json,
    write_text,
)
from dtem_hf.programs.arguments import run_script
from tests.support.full_disk import full_disk


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


def test_permissions_follow_the_umask_which_is_never_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Setting it, if only to read it, changes what other threads write."""
    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patch:
            patch.delattr(os, "umask")
            write_text(tmp_path / "card.md", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "card.md").stat().st_mode & 0o777 == 0o640


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


def test_a_write_that_fails_leaves_no_folders(tmp_path: Path) -> None:
    """Of those that it made; an empty one that was there stays."""
    (tmp_path / "mine").mkdir()
    for write in (replacing, replacing_folder, replacing_together):
        with pytest.raises(RuntimeError, match="disk on fire"), write(tmp_path / "mine" / "out" / "exp"):
            raise RuntimeError("disk on fire")
        assert list(tmp_path.rglob("*")) == [tmp_path / "mine"]


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


def device_link(path: Path) -> None:
    path.symlink_to("/dev/zero")


def sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(3 << 30)


def unix_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # its path may be too long for a socket
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


@contextmanager
def bounded(seconds: int = 20, megabytes: int = 32) -> Iterator[None]:
    """Fails where the block waits for ever, or takes memory."""

    def too_long(*_: object) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(seconds)
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < megabytes << 20
    finally:
        tracemalloc.stop()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("make", [os.mkfifo, device_link, sparse, unix_socket, Path.mkdir], ids=lambda f: f.__name__)
@pytest.mark.parametrize("read", [read_bytes, read_text, read_json], ids=lambda f: f.__name__)
def test_only_regular_files_of_bounded_size_are_read(
    tmp_path: Path, read: Callable[..., object], make: Callable[[Path], object]
) -> None:
    make(tmp_path / "x.json")
    with bounded(), pytest.raises(BadValue, match=r"x\.json=.*(regular file|at most 1000 bytes)"):
        read(tmp_path / "x.json", 1000)


def test_a_file_that_grows_while_it_is_read_is_not_read_further(tmp_path: Path) -> None:
    """Files in /proc say that they are empty."""
    with bounded(), pytest.raises(BadValue, match="at most 1000 bytes"):
        read_bytes("/proc/self/status", 1000)


def test_links_are_followed_where_they_may_be(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("text\r\nof two lines")
    (tmp_path / "link").symlink_to(tmp_path / "there")
    assert read_text(tmp_path / "link", 100) == "text\nof two lines"
    assert read_text(tmp_path / "there", 100, links=False) == "text\nof two lines"
    with pytest.raises(BadValue, match="in the folder itself, not a symbolic link"):
        read_text(tmp_path / "link", 100, links=False)


def write_tensors(path: Path) -> None:
    with replacing(path) as temporary:
        save_file({"x": torch.zeros(9000)}, temporary)


def write_folder(path: Path) -> None:
    with replacing_folder(path) as folder:
        save_file({"x": torch.zeros(9000)}, folder / "model.safetensors")


def write_together(path: Path) -> None:
    with replacing_together(path) as folder:
        save_file({"x": torch.zeros(9000)}, folder / "model.safetensors")


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_text(path, "x" * 9000),
        lambda path: write_json(path, ["x"] * 9000),
        write_tensors,
        write_folder,
        write_together,
    ],
    ids=["text", "JSON", "tensors", "folder", "together"],
)
def test_a_full_disk_names_the_path_on_one_line(
    tmp_path: Path, write: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with full_disk(), pytest.raises(SystemExit) as end:
        run_script(lambda: write(tmp_path / "result"))
    line = capsys.readouterr().err
    assert end.value.code == 1 and line.count("\n") == 1 and f"'{tmp_path / 'result'}'" in line
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    for content in ("old", "new"):
        with replacing_folder(tmp_path / "model") as folder:
            (folder / content).write_text(content)
    with pytest.raises(RuntimeError), replacing_folder(tmp_path / "model") as folder:
        (folder / "half").write_text("")
        raise RuntimeError
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["model", "model/new"]


KILLED = """
import os, signal, sys
from pathlib import Path
from dtem_hf import files

folder, number = Path(sys.argv[1]), int(sys.argv[2])
renames = iter(range(number))
def hook(event, _):
    if event == "os.rename" and next(renames, None) is None:
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
files.write_text(folder / "card.md", "new")
with files.replacing_folder(folder / "model") as model:
    (model / "weights").write_text("new")
with files.replacing_together(folder) as together:
    (together / "a").write_text("new")
    (together / "a.json").write_text("new")
"""


@pytest.mark.parametrize("number", range(6))
def test_what_a_killed_process_leaves_is_removed_and_nothing_else(tmp_path: Path, number: int) -> None:
    """Killed at each of its renames in turn: every file is there, old or new."""
    for name in ("card.md", "model/weights", "a", "a.json", ".hidden", ".card.md.backup", ".x.1234.tmp"):
        write_text(tmp_path / name, "old")
    before = {path.relative_to(tmp_path) for path in tmp_path.rglob("*")}
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), str(number)], env={**os.environ})
    assert done.returncode == (-signal.SIGKILL if number < 5 else 0)
    left = {path.name for path in tmp_path.iterdir()} - {path.parts[0] for path in before}
    assert bool(left) == (number < 5)
    remove_leftovers(tmp_path)
    assert {path.relative_to(tmp_path) for path in tmp_path.rglob("*")} == before
    content = [(tmp_path / name).read_text() for name in ("card.md", "model/weights", "a", "a.json")]
    # The folder takes two renames: the old one aside, the new one into its place.
    renamed = (number > 0, number > 2, number > 3, number > 4)
    assert content == ["new" if is_new else "old" for is_new in renamed]
