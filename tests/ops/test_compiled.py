"""The C is compiled once into a folder of the user's own, or done without."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dtem_hf import BadValue
from dtem_hf.ops.compiled import library
from dtem_hf.ops.switches import is_on


compiled = pytest.mark.skipif(library() is None, reason="needs a C compiler")

_SCRIPT = "from dtem_hf.ops import compiled; print(compiled.library_version())"


def started(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A new process with a cache folder of its own, which says what library it has."""
    return subprocess.run(
        [sys.executable, "-c", _SCRIPT],
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path), **environment},
        capture_output=True,
        text=True,
        check=True,
    )


def library_of(tmp_path: Path, **environment: str) -> bool:
    """Whether a new process with a cache folder of its own has the library."""
    return started(tmp_path, **environment).stdout.strip() != "none"


@compiled
@pytest.mark.skipif(shutil.which("cc", path="/usr/bin:/bin") is None, reason="needs cc in its usual place")
def test_is_compiled_once_into_a_folder_of_the_users_own_and_anew_where_spoilt(tmp_path: Path) -> None:
    assert library_of(tmp_path)
    (built,) = (tmp_path / ".cache" / "dtem_hf").iterdir()
    assert built.parent.stat().st_mode & 0o077 == 0
    assert started(tmp_path).stdout.strip() == built.name.removeprefix("native-")[:8]
    before, content = built.stat().st_mtime_ns, built.read_bytes()
    assert library_of(tmp_path)
    assert built.stat().st_mtime_ns == before
    # Half of a library, or one without its code, can be loaded, and ends the process when it is called.
    for spoilt in (b"spoilt", content[: len(content) // 8], content[:4096] + bytes(len(content) - 4096)):
        built.write_bytes(spoilt)
        assert library_of(tmp_path)
        (built,) = built.parent.iterdir()
        assert built.stat().st_size == len(content)


@compiled
@pytest.mark.skipif(shutil.which("cc", path="/usr/bin:/bin") is None, reason="needs cc in its usual place")
def test_a_compiler_may_come_with_arguments(tmp_path: Path) -> None:
    assert library_of(tmp_path, CC="env cc -g")


@compiled
@pytest.mark.skipif(shutil.which("cc", path="/usr/bin:/bin") is None, reason="needs cc in its usual place")
def test_where_nobody_has_a_home_nothing_is_left_behind(tmp_path: Path) -> None:
    told = started(tmp_path, XDG_CACHE_HOME="relative")
    assert told.stdout.strip() != "none" and not Path("relative").exists()
    assert not list(tmp_path.rglob("*.so"))


def test_does_without_where_it_is_switched_off_or_cannot_be_had(tmp_path: Path) -> None:
    assert not library_of(tmp_path, DTEM_HF_NATIVE="0")
    assert not library_of(tmp_path, CC="no-such-compiler")
    assert not library_of(tmp_path, CC="false")
    assert not list(tmp_path.rglob("*.so"))


def test_a_compiler_that_fails_or_is_not_there_is_warned_about(tmp_path: Path) -> None:
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho no disk today >&2\nexit 1\n", encoding="utf-8")
    compiler.chmod(0o700)
    told = started(tmp_path, CC=str(compiler)).stderr
    assert str(compiler) in told and "no disk today" in told and "DTEM_HF_NATIVE=0" in told
    for absent in ("no-such-compiler", "cc 'unbalanced"):
        assert f"CC={absent!r}" in started(tmp_path, CC=absent).stderr
    for quiet in ({"PATH": str(tmp_path)}, {"DTEM_HF_NATIVE": "0"}):
        assert "Warning" not in started(tmp_path, **quiet).stderr


@compiled
@pytest.mark.skipif(shutil.which("cc", path="/usr/bin:/bin") is None, reason="needs cc in its usual place")
def test_a_folder_that_others_can_write_to_is_not_loaded_from(tmp_path: Path) -> None:
    folder = tmp_path / ".cache" / "dtem_hf"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert library_of(tmp_path)
    assert not list(folder.iterdir())


@pytest.mark.parametrize("name", ["DTEM_HF_NATIVE", "DTEM_HF_TRITON"])
def test_switches_are_on_or_off_and_nothing_else(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(name, raising=False)
    assert is_on(name)
    for value, expected in (("0", False), ("1", True)):
        monkeypatch.setenv(name, value)
        assert is_on(name) == expected
    monkeypatch.setenv(name, "off")
    with pytest.raises(BadValue, match=f"{name}='off': 0 or 1"):
        is_on(name)
