"""The card beside an adapter: written when it is saved or told to, of the records that lie there."""

from __future__ import annotations

import json

import pytest
from huggingface_hub import ModelCard

import dtem_hf
from dtem_hf.hub.card import card_of
from dtem_hf.hub.folder_card import folder_card, is_made, marked, write_card
from tests.hub.test_card import BASE, evaluation, row, training


pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture
def adapter_folder(make_classifier, tmp_path):
    """An adapter of a small model, with the card that saving gives it."""
    dtem_hf.attach(make_classifier(), dtem_hf.DTEMConfig(r=4)).save_merge_adapter(
        tmp_path / "adapter", base_model=BASE
    )
    return tmp_path / "adapter"


def test_saving_an_adapter_writes_a_card(adapter_folder):
    card = ModelCard.load(adapter_folder / "README.md")
    assert card.data.base_model == BASE and "Not evaluated." in card.text


def test_saving_again_tells_the_card_the_new_r(adapter_folder):
    adapter = dtem_hf.MergeAdapter.from_pretrained(adapter_folder)
    assert '"r": 4' in (adapter_folder / "README.md").read_text(encoding="utf-8")
    dtem_hf.MergeAdapter(dtem_hf.DTEMConfig(r=3), adapter.tensors, adapter.backbone).save_pretrained(adapter_folder)
    text = (adapter_folder / "README.md").read_text(encoding="utf-8")
    assert '"r": 3' in text and '"r": 4' not in text and is_made(text)


def test_a_card_takes_the_place_of_the_one_before_and_nothing_else_changes(adapter_folder):
    (adapter_folder / "evaluation.json").write_text(json.dumps(evaluation()))
    (adapter_folder / "README.md").write_text("mine")
    before = sorted(path.name for path in adapter_folder.iterdir())
    written = write_card(adapter_folder)
    assert written == adapter_folder / "README.md"
    assert sorted(path.name for path in adapter_folder.iterdir()) == before
    assert is_made(written.read_text(encoding="utf-8"))
    assert len(ModelCard.load(written).data.eval_results) == 6
    dtem_hf.MergeAdapter.from_pretrained(adapter_folder)


def test_a_folders_card_is_what_card_of_says(adapter_folder):
    (adapter_folder / "README.md").unlink()
    (adapter_folder / "accuracy.png").write_bytes(b"")
    for name, record in (("evaluation", evaluation()), ("training", training())):
        (adapter_folder / f"{name}.json").write_text(json.dumps(record))
    adapter = dtem_hf.MergeAdapter.from_pretrained(adapter_folder)
    pictures = {"Accuracy against multiply-adds": "accuracy.png"}
    expected = card_of(
        adapter.config, adapter.backbone, evaluation(), training=training(), pictures=pictures, repo_id="me/adapter"
    )
    text = folder_card(adapter_folder, "me/adapter")
    assert text == marked(expected) and text.startswith(str(expected).strip())


def test_the_training_record_beside_the_adapter_is_read(adapter_folder):
    assert "Not recorded." in write_card(adapter_folder).read_text(encoding="utf-8")
    (adapter_folder / "training.json").write_text(json.dumps(training()))
    assert "- Seed: 7" in write_card(adapter_folder).read_text(encoding="utf-8")


def test_what_makes_no_card_is_named_and_the_card_stays(adapter_folder, tmp_path):
    before = (adapter_folder / "README.md").read_bytes()
    with pytest.raises(FileNotFoundError, match=r"no merge_config\.json in .*nowhere"):
        write_card(tmp_path / "nowhere")
    bad = {"rows": [row("dtem", 8, 1.0, -1, kl="x")]}
    for record, message in (([], r"evaluation\.json='list': a JSON object"), (evaluation(**bad), "kl")):
        (adapter_folder / "evaluation.json").write_text(json.dumps(record))
        with pytest.raises(ValueError, match=message):
            write_card(adapter_folder)
    assert (adapter_folder / "README.md").read_bytes() == before
