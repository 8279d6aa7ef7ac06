"""Names that would harm a card do not change its structure, and records that make no sense are refused."""

from __future__ import annotations

import pytest
from huggingface_hub import ModelCard

import dtem_hf
from dtem_hf.hub.card import card_of
from tests.hub.test_card import evaluation, facts, row, saved, training


pytestmark = pytest.mark.usefixtures("offline")
EVIL = [
    "x\n---\nlicense: evil\n---\n# Hacked",
    "x\r\n\r\n## Hacked\r\n\r\n- a",
    "x\u2028# Hacked\u2029\x85# b\x0b\x0c\x00\x1b[31m",
    "`` ` ``` <script>alert(1)</script> ```",
    "a | b | c \\| d || e",
    "---",
    "[click](http://evil.example) ![x](http://evil.example/p.png) <http://evil.example>",
    "{{ 7 * 7 }}{% raw %}{{ card_data }}",
    "*b* _i_ ~~s~~ # h $$x$$ @user",
    "\ud800\u202eabc\ufffe",
    "",
    ": !!python/object:os.system [",
]


def structure(text: str) -> list[str]:
    """The kinds of Markdown elements in a text, in order, without their content."""
    markdown_it = pytest.importorskip("markdown_it")
    kinds = []
    for token in markdown_it.MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(text):
        kinds += [token.type, *(child.type for child in token.children or ())]
    # A run of plain text may be split at characters that turned out not to be special.
    return [kind for i, kind in enumerate(kinds) if kind not in ("text", "text_special") or kinds[i - 1] != kind]


@pytest.mark.parametrize("evil", EVIL)
def test_no_name_changes_the_structure(tmp_path, evil):
    def card(text: str) -> ModelCard:
        record = evaluation(
            command=text,
            data={"name": text, "num_images": 3, "labelled": True},
            device=text,
            dtype=text,
            hardware=text,
            versions={"torch": text, text: "1"},
        )
        trained = training(
            command=text,
            arguments={text: text, "list": [text]},
            data={"name": text or "-", "num_images": 3},
            hardware=text,
            best_validation={text: 1.0},
            versions={text: text},
        )
        backbone = facts(model_type=text, base_model=text or "-", base_revision=text or "-")
        pictures = {text or "-": "accuracy.png"}
        made = card_of(dtem_hf.DTEMConfig(), backbone, record, training=trained, pictures=pictures)
        return saved(made, tmp_path)

    plain, injected = card("a plain name"), card(evil)
    assert injected.data.to_dict().keys() == plain.data.to_dict().keys()
    for name in ("license", "library_name", "pipeline_tag", "metrics"):
        assert injected.data.get(name) == plain.data.get(name)
    assert injected.data.tags == ["token-merging", "dtem"]
    assert injected.data.datasets is None and injected.data.base_model is None
    assert structure(injected.text) == structure(plain.text)
    assert "html_block" not in structure(injected.text) and "html_inline" not in structure(injected.text)
    assert [x.metric_value for x in injected.data.eval_results] == [x.metric_value for x in plain.data.eval_results]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": [row("dtem\n---", 8, 1.0, 1)]}, r"evaluation\.rows\[0\]\.method"),
        ({"rows": [row("dtem", "| x |", 1.0, 1)]}, r"evaluation\.rows\[0\]\.r"),
        ({"rows": [row("dtem", {"kind": "x\n"}, 1.0, 1)]}, r"evaluation\.rows\[0\]\.r"),
        ({"rows": [row("dtem", 8, None, 1, top5="78\n---")]}, r"evaluation\.rows\[0\]\.top5.*a number"),
        ({"rows": [row("dtem", 8, float("nan"), 1)]}, r"evaluation\.rows\[0\]\.top1=nan"),
        ({"rows": [row("dtem", 8, 1.0, 1, kl=None)]}, r"evaluation\.rows\[0\]\.kl"),
        ({"rows": ["x"]}, r"evaluation\.rows\[0\]"),
        ({"rows": None}, r"evaluation\.rows"),
        ({"image_size": ["a", "b"]}, r"evaluation\.image_size"),
        ({"batch_size": "8 |"}, r"evaluation\.batch_size"),
        ({"data": {"name": 3, "num_images": 1}}, r"evaluation\.data\.name"),
        ({"data": None}, r"evaluation\.data"),
        ({"task": "x\n---"}, r"evaluation\.task"),
        ({"adapter": None}, r"evaluation\.adapter"),
    ],
)
def test_an_evaluation_that_makes_no_sense_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        card_of(dtem_hf.DTEMConfig(), facts(), evaluation(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": "400 |"}, r"training\.steps"),
        ({"seconds": float("inf")}, r"training\.seconds"),
        ({"steps": 10**400}, r"training\.steps"),
        ({"seed": 1.5}, r"training\.seed"),
        ({"best_validation": {"kl": "x"}}, r"training\.best_validation\.kl"),
        ({"arguments": []}, r"training\.arguments"),
    ],
)
def test_a_training_record_that_makes_no_sense_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        card_of(dtem_hf.DTEMConfig(), facts(), None, training=training(**changes))


@pytest.mark.parametrize(
    "name", ["../x.png", "/x.png", "a b.png", "x.png) [y](z", "x\n.png", "", "a//b.png", ".x.png"]
)
def test_a_picture_stays_in_the_folder(name):
    with pytest.raises(ValueError, match="pictures="):
        card_of(dtem_hf.DTEMConfig(), facts(), None, pictures={"A picture": name})
