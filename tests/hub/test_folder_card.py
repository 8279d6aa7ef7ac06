"""The card beside an adapter: written when it is saved or told to, of the records that lie there."""

from __future__ import annotations

import json

import pytest
from huggingface_hub import ModelCard

import dtem_hf
from dtem_hf.hub.card import card_of
from dtem_hf.hub.folder_card import write_card
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


def test_write_card_does_not_overwrite_unless_told(adapter_folder, tmp_path):
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation()))
    (adapter_folder / "README.md").write_text("mine")
    before = sorted(path.name for path in adapter_folder.iterdir())
    with pytest.raises(FileExistsError, match=r"README\.md is there already; pass overwrite=True"):
        write_card(adapter_folder, tmp_path / "evaluation.json")
    assert (adapter_folder / "README.md").read_text() == "mine"
    written = write_card(adapter_folder, tmp_path / "evaluation.json", overwrite=True)
    assert written == adapter_folder / "README.md"
    assert sorted(path.name for path in adapter_folder.iterdir()) == before
    assert written.read_text(encoding="utf-8").endswith(".\n")
    assert len(ModelCard.load(written).data.eval_results) == 6
    dtem_hf.MergeAdapter.from_pretrained(adapter_folder)


def test_write_card_is_what_card_of_says(adapter_folder, tmp_path):
    (adapter_folder / "README.md").unlink()
    (adapter_folder / "accuracy.png").write_bytes(b"")
    for name, record in (("evaluation", evaluation()), ("training", training())):
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    pictures = {"Accuracy": "accuracy.png"}
    written = write_card(
        adapter_folder, tmp_path / "evaluation.json", tmp_path / "training.json", pictures, repo_id="me/adapter"
    )
    adapter = dtem_hf.MergeAdapter.from_pretrained(adapter_folder)
    expected = card_of(
        adapter.config, adapter.backbone, evaluation(), training=training(), pictures=pictures, repo_id="me/adapter"
    )
    assert written.read_text(encoding="utf-8").strip() == str(expected).strip()


def test_the_training_record_beside_the_adapter_is_read(adapter_folder):
    assert "Not recorded." in write_card(adapter_folder, overwrite=True).read_text(encoding="utf-8")
    (adapter_folder / "training.json").write_text(json.dumps(training()))
    assert "- Seed: 7" in write_card(adapter_folder, overwrite=True).read_text(encoding="utf-8")


def test_what_is_not_there_is_named_and_the_card_stays(adapter_folder, tmp_path):
    before = (adapter_folder / "README.md").read_bytes()
    with pytest.raises(FileNotFoundError, match="no adapter folder"):
        write_card(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"evaluation\.json"):
        write_card(adapter_folder, tmp_path / "evaluation.json", overwrite=True)
    with pytest.raises(FileNotFoundError, match=r"no picture plot\.png"):
        write_card(adapter_folder, pictures={"Plot": "plot.png"}, overwrite=True)
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match=r"list\.json='list': a JSON object"):
        write_card(adapter_folder, tmp_path / "list.json", overwrite=True)
    (tmp_path / "bad.json").write_text(json.dumps(evaluation(rows=[row("dtem", 8, 1.0, -1, kl="x")])))
    with pytest.raises(ValueError, match="kl"):
        write_card(adapter_folder, tmp_path / "bad.json", overwrite=True)
    assert (adapter_folder / "README.md").read_bytes() == before
