"""Transformers' own Auto classes, and its pipelines, take every class of every family when they are registered."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import (
    ASTFeatureExtractor,
    BertTokenizer,
    Blip2Processor,
    BlipProcessor,
    GitProcessor,
    InstructBlipProcessor,
    OwlViTImageProcessorPil,
    Siglip2ImageProcessorPil,
    ViTImageProcessorPil,
)

from dtem_hf import (
    attach,
    register,
    unregister,
)
from tests.families.test_auto_classes import MERGE, by_model, same_weights
from tests.support.ecosystem import (
    tasks_of,
)
from tests.support.families import CASES
from tests.support.family_case import PATCH, WORDS, FamilyCase


SIDE = 24


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    register()
    yield
    unregister()


@by_model
def test_registered_auto_classes_merge(case: FamilyCase, auto: str, model_class: Any, tmp_path: Path) -> None:
    """A checkpoint of every class of every family comes back as that class, plain or merged, as is asked."""
    stock, plain = getattr(transformers, auto), case.make_small(model_class)
    if auto == "AutoBackbone":  # asks the Hub before it looks into a folder, so this is as far as it goes without one
        merged = stock.from_config(attach(plain, MERGE).config)
        assert isinstance(merged, model_class)
        assert merged.merge_config == MERGE
        return
    plain.save_pretrained(tmp_path)
    merged = stock.from_pretrained(tmp_path, merge=MERGE)
    assert type(merged) is type(attach(case.make_small(model_class), MERGE))
    assert merged.merge_config == MERGE
    assert same_weights(merged, plain)
    for kwargs in ({}, {"merge": None}):
        found = stock.from_pretrained(tmp_path, **kwargs)
        assert type(found) is model_class
        assert same_weights(found, plain)
    merged.save_pretrained(tmp_path)
    again = stock.from_pretrained(tmp_path)
    assert type(again) is type(merged)
    assert again.merge_config == MERGE


# Pipelines


def tokenizer() -> Any:
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    return BertTokenizer(vocab=vocabulary, model_input_names=["input_ids", "attention_mask"])


def parts(case: FamilyCase, task: str) -> dict[str, Any]:
    """What a pipeline needs beside the model."""
    size = {"height": SIDE, "width": SIDE}
    if task == "audio-classification":
        return {"feature_extractor": ASTFeatureExtractor(num_mel_bins=SIDE, max_length=SIDE)}
    look = Siglip2ImageProcessorPil(patch_size=PATCH, max_num_patches=36)
    look = look if case.family == "siglip2" else ViTImageProcessorPil(size=size)
    if task == "zero-shot-object-detection":
        look = OwlViTImageProcessorPil(size=size, crop_size=size)
    if task == "image-text-to-text" and case.family == "blip_2":
        return {"processor": Blip2Processor(look, tokenizer(), num_query_tokens=4)}
    if task == "image-text-to-text" and case.family == "instructblip":
        return {"processor": InstructBlipProcessor(look, tokenizer(), tokenizer(), num_query_tokens=4)}
    if task == "image-text-to-text":
        return {"processor": (GitProcessor if case.family == "git" else BlipProcessor)(look, tokenizer())}
    return {"image_processor": look, **({"tokenizer": tokenizer()} if task.startswith("zero-shot") else {})}


def ask(task: str, pipe: Any) -> Any:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, size=(6, 5, 3), dtype=np.uint8)).resize((40, 50))
    torch.manual_seed(0)  # what is masked at random is masked alike
    if task == "audio-classification":
        return pipe(np.random.default_rng(0).standard_normal(8000, dtype=np.float32))
    if task.startswith("zero-shot"):
        options = {"threshold": 0.0} if task == "zero-shot-object-detection" else {}
        return pipe(image, candidate_labels=["cat", "dog", "hen"], **options)
    if task == "image-text-to-text":
        return pipe(images=image, text="a photo", max_new_tokens=4)
    return pipe(image)


def alike(ours: Any, theirs: Any) -> None:
    if isinstance(theirs[0], dict):
        near = [{k: pytest.approx(v, abs=1e-5) if isinstance(v, float) else v for k, v in x.items()} for x in theirs]
        assert ours == near
    else:
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


PIPELINES = [(case, *rest) for case in CASES.values() for rest in tasks_of(case)]


@pytest.mark.parametrize(
    "case, task, auto, model_class", PIPELINES, ids=[f"{task}-{cls.__name__}" for _, task, _, cls in PIPELINES]
)
def test_pipelines_run_merged_models(case: FamilyCase, task: str, auto: str, model_class: Any, tmp_path: Path) -> None:
    """One that is given, one that is loaded with `model_kwargs`, one that was saved merged: they answer alike."""
    plain = case.make_small(model_class)
    plain.save_pretrained(tmp_path / "plain")
    merged = attach(case.make_small(model_class), MERGE)
    merged.save_pretrained(tmp_path / "merged")
    given = transformers.pipeline(task, model=merged, **parts(case, task))
    plan = merged.merge_plan()
    with merged.trace_merging() as trace:
        answer = ask(task, given)
    assert [sizes.shape[1] for sizes in trace.sizes] == plan.tokens
    for folder, kwargs in (("plain", {"model_kwargs": {"merge": MERGE}}), ("merged", {})):
        pipe = transformers.pipeline(task, model=str(tmp_path / folder), device="cpu", **kwargs, **parts(case, task))
        assert type(pipe.model) is type(merged)
        assert pipe.model.merge_config == MERGE
        alike(ask(task, pipe), answer)
