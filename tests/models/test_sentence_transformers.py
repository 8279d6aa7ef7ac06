"""SentenceTransformer loads merged models through transformers' Auto classes, after register()."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast

from dtem_hf import AutoModel, ToMeConfig, register, unregister


sentence_transformers = pytest.importorskip("sentence_transformers")
SHAPE = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}


@pytest.fixture
def clip_folder(tmp_path: Path) -> Iterator[Path]:
    words = ["<pad>", "<s>", "</s>", "a", "picture"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "a"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=16, **special)
    vision = {**SHAPE, "image_size": 32, "patch_size": 4, "num_hidden_layers": 4}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    text = {**SHAPE, **ids, "num_hidden_layers": 1, "vocab_size": 5, "max_position_embeddings": 16}
    config = CLIPConfig(vision_config=vision, text_config=text, projection_dim=16, initializer_range=0.2)
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(pictures, fast).save_pretrained(tmp_path / "clip")
    register()
    yield tmp_path / "clip"
    unregister()


def test_embeddings_are_those_of_the_merged_model_and_a_saved_one_comes_back(
    clip_folder: Path, tmp_path: Path
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    config = ToMeConfig(r=9)
    kind = sentence_transformers.SentenceTransformer
    plain = kind(str(clip_folder), device="cpu").encode([picture])
    merged = kind(str(clip_folder), device="cpu", model_kwargs={"merge": config})
    found = merged.encode([picture])
    model = AutoModel.from_pretrained(clip_folder, merge=config).eval()
    with torch.no_grad():
        inputs = CLIPProcessor.from_pretrained(clip_folder)(images=picture, return_tensors="pt")
        expected = model.get_image_features(**inputs).pooler_output
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(found - plain).max() > 1e-3
    merged.save(str(tmp_path / "saved"))
    assert np.array_equal(kind(str(tmp_path / "saved"), device="cpu").encode([picture]), found)
