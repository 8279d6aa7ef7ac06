"""Records as they may be published: nothing private, nothing that could be markup."""

from __future__ import annotations

import pytest

from dtem_hf.hub.records import as_code, as_line, as_text, clean, is_repo_id, without_private


@pytest.mark.parametrize(
    ("text", "published"),
    [
        ("train.py --data /home/alice/photos --r 16", "train.py --data …/photos --r 16"),
        ("~/runs/secret/x", "…/x"),
        ("evaluate.py --data '/srv/al ice/my photos' --r 8", "evaluate.py --data '…/my photos' --r 8"),
        ("/srv/al ice/my photos", "…/my photos"),
        (r"C:\Users\alice\photos", "…/photos"),
        ("token hf_AbCdEfGhIjKlMnOpQrStUv", "token hf_…"),
        ("hf_transfer", "hf_transfer"),
        ("https://a.example/b/c", "https://a.example/b/c"),
        ("../data/train and me/photos", "../data/train and me/photos"),
        ("1/2 of 3/4", "1/2 of 3/4"),
    ],
)
def test_tokens_and_folders_of_the_machine_are_cut(text: str, published: str) -> None:
    assert without_private({"a": [text, 3, None], text: {"b": text}}) == {
        "a": [published, 3, None],
        published: {"b": published},
    }


@pytest.mark.parametrize(
    "text", ["a\nb", "a\r\n\r\nb", "a\u2028b", "a\x00\x1b[2Jb", "  a   b  ", "a" * 5000, "\ud800"]
)
def test_clean_text_is_one_printable_line(text: str) -> None:
    shown = clean(text)
    assert shown.isprintable() and len(shown) <= 1001 and shown == shown.strip()


def test_code_and_lines_hold_no_backtick() -> None:
    assert as_code("a`b``c") == "`a'b''c`" and as_code("") == "` `"
    assert as_line("```\nx") == "''' x"


def test_markup_is_escaped() -> None:
    assert as_text("*a* [b](c) <d> | `e`") == r"\*a\* \[b\]\(c\) \<d\> \| \`e\`"


@pytest.mark.parametrize(
    ("name", "known"), [("me/a", True), ("gpt2", True), ("a/b/c", False), ("", False), (None, False)]
)
def test_ids_of_repositories(name: str | None, known: bool) -> None:
    assert is_repo_id(name) is known
