"""What of a folder would be published, and what is read from a downloaded card. (Pushes are in test_hub.py.)"""

from __future__ import annotations

import json
import os
import signal
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dtem_hf import DTEMConfig, MergeAdapter, attach
from dtem_hf.errors import AdapterError, BadValue
from dtem_hf.hub.folder_card import folder_card, refreshed_card, write_card
from dtem_hf.hub.publishing import card_results, publish_folder, published_files


@pytest.fixture
def folder(make_classifier: Callable[..., Any], tmp_path: Path) -> Path:
    attach(make_classifier(), DTEMConfig(r=4)).save_merge_adapter(tmp_path / "adapter", base_model="user/tiny")
    return tmp_path / "adapter"


def card(results: str) -> str:
    return f"---\nmodel-index:\n- name: x\n  results:\n{results}---\n# A card\n"


def result(value: str, name: str = "Digits", metric: str = "top-1") -> str:
    return (
        f"  - task: {{type: image-classification}}\n    dataset: {{type: digits, name: {name}}}\n"
        f"    metrics:\n    - {{type: accuracy, value: {value}, name: {metric}}}\n"
    )


def test_what_is_published_is_what_lies_there(folder: Path) -> None:
    files = published_files(folder, "me/a")
    assert set(files) == {"merge_config.json", "merge_adapter.safetensors", "README.md", "config.json"}
    for name in ("merge_config.json", "merge_adapter.safetensors"):
        assert files[name] == (folder / name).read_bytes()
    assert files["README.md"].decode() == folder_card(folder, repo_id="me/a")
    assert json.loads(files["config.json"]) == {"model_type": "dtem_hf_merge_adapter"}
    assert {path.name for path in folder.iterdir()} == set(files) - {"config.json"}


def test_pictures_go_with_the_card_that_shows_them(folder: Path) -> None:
    for name in ("accuracy.png", "own.jpg", "unused.png"):
        Image.new("RGB", (2, 2)).save(folder / name)
    assert "accuracy.png" in published_files(folder)  # a card that was not edited is made anew
    (folder / "README.md").write_text("![mine](own.jpg) and [a link](/etc/passwd) and ![far](http://a.example/x.png)")
    files = published_files(folder)
    assert {name for name in files if name.endswith(("png", "jpg"))} == {"own.jpg"}


def device_link(path: Path) -> None:
    path.symlink_to("/dev/zero")


def sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(3 << 30)


@contextmanager
def bounded() -> Iterator[None]:
    """Fails where the block waits for ever, or takes memory."""

    def too_long(*_: object) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(20)
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


FILES = ["merge_config.json", "merge_adapter.safetensors", "README.md", "evaluation.json", "training.json", "own.png"]


def replace_file(folder: Path, name: str, make: Callable[[Path], object]) -> None:
    """Put something else in the place of a file; a picture is shown by the card."""
    if name == "own.png":
        (folder / "README.md").write_text("![mine](own.png)")
    (folder / name).unlink(missing_ok=True)
    make(folder / name)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("make", [os.mkfifo, device_link, sparse], ids=lambda make: make.__name__)
def test_what_is_no_file_of_reasonable_size_is_not_published(
    folder: Path, name: str, make: Callable[[Path], object]
) -> None:
    replace_file(folder, name, make)
    with bounded(), pytest.raises(ValueError, match=name.replace(".", r"\.")):
        published_files(folder)


@pytest.mark.parametrize("name", ["merge_config.json", "merge_adapter.safetensors", "README.md"])
@pytest.mark.parametrize("make", [os.mkfifo, device_link, sparse], ids=lambda make: make.__name__)
def test_what_is_no_file_of_reasonable_size_is_not_read(
    folder: Path, name: str, make: Callable[[Path], object]
) -> None:
    replace_file(folder, name, make)
    with bounded():
        if name == "README.md":  # an adapter loads without its card
            assert card_results(str(folder)) == []
            assert MergeAdapter.from_pretrained(folder).embed_dim == 8
        else:
            with pytest.raises(AdapterError, match=name.replace(".", r"\.")):
                MergeAdapter.from_pretrained(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_link_is_not_followed_out_of_the_folder(folder: Path, tmp_path: Path, name: str) -> None:
    """Not even to a file that would do."""
    sound = {"evaluation.json": None, "training.json": '{"steps": 7}', "own.png": "a picture"}
    private = tmp_path / "private"
    if name in sound:
        private.write_text(sound[name] or "{}")
    else:
        private.write_bytes((folder / name).read_bytes())
    replace_file(folder, name, lambda path: path.symlink_to(private))
    with pytest.raises(BadValue, match=r"in the folder itself, not a symbolic link"):
        published_files(folder)


def test_tokens_and_folders_in_a_config_are_not_published(folder: Path) -> None:
    """The name of the backbone, say, where a token was given for it."""
    token = "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz01234567"
    config = json.loads((folder / "merge_config.json").read_text())
    config["backbone"].update(base_model=token, model_type=token, base_revision="/home/alice/models/tiny")
    (folder / "merge_config.json").write_text(json.dumps(config))
    (folder / "README.md").unlink()
    everything = b"".join(published_files(folder, "me/a").values())
    assert b"AbCdEf" not in everything and b"alice" not in everything
    card_path = write_card(folder)
    assert "AbCdEf" not in card_path.read_text() and "alice" not in card_path.read_text()


def test_a_card_follows_its_folder_until_it_is_edited(folder: Path) -> None:
    with refreshed_card(folder):
        (folder / "training.json").write_text('{"steps": 7}')
    assert "- Steps: 7" in (folder / "README.md").read_text()
    (folder / "README.md").write_text("mine")
    with pytest.warns(UserWarning, match=r"README\.md was edited and is kept"), refreshed_card(folder):
        (folder / "training.json").write_text('{"steps": 8}')
    assert (folder / "README.md").read_text() == "mine"


def test_a_record_that_makes_no_card_is_no_obstacle_to_the_one_that_takes_its_place(folder: Path) -> None:
    (folder / "training.json").write_text("[]")
    with refreshed_card(folder):
        (folder / "training.json").write_text('{"steps": 7}')
    assert "- Steps: 7" in (folder / "README.md").read_text()


def test_a_card_that_was_made_is_made_again_whatever_came_into_the_folder(folder: Path) -> None:
    (folder / "README.md").write_text(folder_card(folder, repo_id="me/a").replace("\n", "\r\n"))  # as downloaded
    (folder / "accuracy.png").write_bytes(b"")
    with pytest.raises(KeyboardInterrupt), refreshed_card(folder):
        (folder / "training.json").write_text('{"steps": 7}')
        raise KeyboardInterrupt
    with refreshed_card(folder):
        pass
    text = (folder / "README.md").read_text()
    assert "- Steps: 7" in text and "(accuracy.png)" in text
    (folder / "README.md").write_text(text.replace("- Steps: 7", "- Steps: 8"))
    with pytest.warns(UserWarning, match="is kept"), refreshed_card(folder):
        pass


def test_results_are_numbers_and_their_names_one_clean_line(folder: Path) -> None:
    name = '"a\\e[31mb\\nc"'
    (folder / "README.md").write_text(card(result("91.5", name, name)))
    assert card_results(str(folder)) == [
        {"task": "image-classification", "dataset": "a [31mb c", "split": None, "metric": "a [31mb c", "value": 91.5}
    ]


@pytest.mark.parametrize("value", [".nan", ".inf", "many", "[1, 2]", "{a: 1}", "2025-01-01", "1" + "0" * 400])
def test_what_is_no_number_is_no_result(folder: Path, value: str) -> None:
    (folder / "README.md").write_text(card(result(value) + result("3")))
    assert [found["value"] for found in card_results(str(folder))] == [3]


def bomb() -> str:
    """Ten anchors, each a list of ten times the one before: 10^10 items if anything wrote them out."""
    lines = ["---", "a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 11)]
    metrics = "[{type: accuracy, value: *a10, name: *a10}]"
    dataset = "{type: x, name: *a10}"
    index = f"model-index: [{{name: x, results: [{{task: {{type: x}}, dataset: {dataset}, metrics: {metrics}}}]}}]"
    return "\n".join([*lines, index, "---", ""])


@pytest.mark.parametrize(
    "text",
    [
        bomb(),
        "---\n" + "a: " + "[" * 3000 + "\n---\n",
        "---\n!!python/object/apply:os.system ['touch pwned']\n---\n",
        "---\nmodel-index: 3\n---\n",
        "---\nmodel-index: [{name: x, results: [{task: 3}]}]\n---\n",
        "---\nmodel-index: [{results: {}}]\n---\n",
        "---\n" + "".join(f"key{i}: value\n" for i in range(20_000)) + "---\n",
        "x" * (1 << 21),
        "\x00\x01\x02",
    ],
    ids=["bomb", "deep", "object", "number", "task", "no name", "long", "huge", "binary"],
)
def test_a_hostile_card_has_no_results(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "README.md").write_text(text)
    assert card_results(str(folder)) == []
    assert not (folder / "pwned").exists()


@pytest.mark.parametrize("repo_id", ["bad id", "", 3, "a/b/c"])
def test_what_is_no_id_of_a_repository_is_named_before_a_token_is_asked_for(folder, repo_id):
    for publish in (published_files, publish_folder):
        with pytest.raises(ValueError, match=r"repo_id=.*: USER/REPO"):
            publish(folder, repo_id)
