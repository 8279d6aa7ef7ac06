"""The adapters in model_cards/: each loads by its path, and its card is what the JSON beside it gives."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTForImageClassification

from dtem_hf import DTEMConfig, MergeAdapter, attach
from dtem_hf.configuration import CONFIG_NAME
from dtem_hf.hub.folder_card import folder_card
from tests.support.children import run_python


ROOT = Path(__file__).resolve().parents[1]
FOLDERS = sorted(path.parent for path in (ROOT / "model_cards").glob(f"*/{CONFIG_NAME}"))
MODELS = {"vit": (ViTConfig, ViTForImageClassification), "dinov2": (Dinov2Config, Dinov2Model)}
published = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


@published
def test_the_card_is_what_the_json_gives(folder: Path) -> None:
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card == folder_card(folder)
    assert "Not evaluated" not in card and "Not recorded" not in card
    for picture in re.findall(r"!\[.*\]\((.*)\)", card):
        assert (folder / picture).is_file()
    content = (folder / "merge_adapter.safetensors").read_bytes()
    assert len(content) < 1_500_000
    assert json.loads((folder / CONFIG_NAME).read_text())["tensors_sha256"] == hashlib.sha256(content).hexdigest()


@published
def test_it_loads_by_its_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into a model of the recorded shape, with random weights."""
    monkeypatch.chdir(ROOT)
    facts = MergeAdapter.from_pretrained(folder)
    config_class, model_class = MODELS[facts.backbone.model_type]
    width, layers = facts.backbone.hidden_size, facts.backbone.num_layers
    config = config_class(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // facts.embed_dim,
        intermediate_size=4 * width,
        image_size=64,
        patch_size=8,
    )
    model = attach(model_class(config), f"model_cards/{folder.name}")
    tensors = model.to_merge_adapter().tensors
    assert tensors.keys() == facts.tensors.keys()
    assert all(torch.equal(tensors[name], facts.tensors[name]) for name in tensors)


def test_the_recipe_writes_cards_and_plots_and_the_same_ones_again(
    make_classifier: Callable[..., Any], tmp_path: Path
) -> None:
    adapter = tmp_path / "cards" / "tiny"
    attach(make_classifier(), DTEMConfig(r=4)).save_merge_adapter(adapter, base_model="user/tiny")
    row = {
        "agreement": 91.0,
        "kl": 0.1,
        "multiply_adds": 10**9,
        "ratio": 1.0,
        "images_per_second": 9.0,
        "speedup": 1.0,
    }
    rows = [{"method": "none", "r": None, "top1": 80.0, "top5": 95.0, **row}]
    rows += [
        {"method": m, "r": 8, "top1": 79.0, "top5": 94.0, **row, "multiply_adds": 7**10} for m in ("tome", "dtem")
    ]
    data = {"name": "user/photos", "num_images": 50, "labelled": True}
    record = {"command": "evaluate.py", "model": {"name": "tiny"}, "adapter": "tiny", "data": data, "rows": rows}
    record |= {"image_size": [32, 32], "batch_size": 8, "device": "cpu", "threads": 1, "dtype": "float32"}
    (adapter / "evaluation.json").write_text(json.dumps({**record, "versions": {}}))
    (tmp_path / "cards" / "no adapter").mkdir()

    seen = []
    for _ in range(2):
        done = run_python([ROOT / "recipes" / "model_cards.py", tmp_path / "cards"], check=True)
        seen.append({path.name: path.read_bytes() for path in adapter.iterdir()})
    assert done.stdout.count("written: ") == 1
    assert seen[0] == seen[1]
    assert seen[0]["accuracy.png"].startswith(b"\x89PNG")
    assert b"| DTEM | r=8 | 79.00 | 94.00 |" in seen[0]["README.md"] and b"(accuracy.png)" in seen[0]["README.md"]
