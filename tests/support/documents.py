"""The Python in README and docs, run as it stands, in a process that knows the loopback Hub."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import dtem_hf
from tests.support.loopback_hub import LoopbackHub


ROOT = Path(__file__).resolve().parents[2]
# What readers are told to have, by the name that the pages use for it.
CLASSIFIER, LANGUAGE_MODEL, ADAPTER = (
    "facebook/deit-small-patch16-224",
    "llava-hf/llava-1.5-7b-hf",
    "me/dtem-deit-small",
)


def blocks_of(page: Path) -> list[str]:
    """The Python blocks of a page, but for those of Optimum, which wants an older transformers."""
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [block for block in blocks if "from optimum" not in block]


def fill(hub: LoopbackHub, folders: Mapping[str, Path]) -> None:
    """Put small models on the Hub under the names that the pages use; the adapter is private, with a tag."""
    for name, folder in folders.items():
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        commit = hub.commit(name, files, private=name == ADAPTER)
        hub.repos[name].tags["v1"] = commit


def run(page: str, given: str, expected: str, folder: str) -> bool:
    """Run a page's blocks one after the other in a folder, and say whether an expression holds then.

    `given` says what a reader has before the page: a Python expression for `model`, or "".
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    names: dict[str, Any] = {
        "dtem_hf": dtem_hf,
        "pixel_values": torch.randn(2, 3, 32, 32),
        "dataset": [{"pixel_values": torch.randn(3, 32, 32), "labels": i} for i in range(2)],
        "picture": Image.new("RGB", (40, 32), (200, 90, 30)),
    }
    if given:
        names["model"] = eval(given, names)
    with inside(folder), pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", "hf_me")
        for block in blocks_of(ROOT / page):
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(block, page, "exec"), names)
        return bool(eval(expected, names))


@contextlib.contextmanager
def inside(folder: str) -> Iterator[None]:
    """Run a block in a folder, as contextlib.chdir does from Python 3.11 on."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
