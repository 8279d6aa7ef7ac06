"""Optimum loads exported folders: make test-optimum.

It runs where Optimum is, which wants an older transformers than this library, and so imports nothing of the library.
OPTIMUM_FOLDERS names what tests/support/optimum_folders.py wrote.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from optimum.intel import OVModelForCustomTasks, OVModelForImageClassification
from optimum.onnxruntime import ORTModelForCustomTasks, ORTModelForFeatureExtraction, ORTModelForImageClassification
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, pipeline


FOLDERS = Path(os.environ["OPTIMUM_FOLDERS"])
# On a processor with bfloat16, Optimum's OpenVINO would round to it.
EXACT = {"ov_config": {"INFERENCE_PRECISION_HINT": "f32"}}


def expected(name):
    arrays = np.load(FOLDERS / name / "exported" / "expected.npz")
    return torch.from_numpy(arrays["pixels"]), {key: arrays[key] for key in arrays.files if key != "pixels"}


@pytest.mark.parametrize(
    "kind, options", [(ORTModelForImageClassification, {}), (OVModelForImageClassification, EXACT)]
)
def test_a_classifier_and_its_pipeline(kind, options):
    folder = FOLDERS / "classifier" / "exported"
    model, processor = kind.from_pretrained(folder, **options), AutoImageProcessor.from_pretrained(folder)
    pixels, outputs = expected("classifier")
    np.testing.assert_allclose(model(pixel_values=pixels).logits, outputs["logits"], atol=1e-4)
    picture = Image.open(folder / "picture.png")
    np.testing.assert_allclose(processor(picture, return_tensors="pt")["pixel_values"], pixels, atol=1e-6)
    found = pipeline("image-classification", model=model, image_processor=processor)(picture, top_k=5)
    scores = torch.from_numpy(outputs["logits"])[0].softmax(-1)
    best = AutoConfig.from_pretrained(folder).id2label[int(scores.argmax())]
    assert found[0]["label"] == best and abs(found[0]["score"] - float(scores.max())) < 1e-4


@pytest.mark.parametrize("count", [1, 3])
def test_an_encoder_gives_its_features(count):
    pixels, outputs = expected("encoder")
    folder = FOLDERS / "encoder" / "exported"
    found = ORTModelForFeatureExtraction.from_pretrained(folder)(pixel_values=pixels.repeat(count, 1, 1, 1))
    for state in found.last_hidden_state:
        np.testing.assert_allclose(state, outputs["last_hidden_state"][0], atol=1e-4)


@pytest.mark.parametrize("kind, options", [(ORTModelForCustomTasks, {}), (OVModelForCustomTasks, EXACT)])
@pytest.mark.parametrize(
    "name, keys",
    [
        ("encoder", ["last_hidden_state", "pooler_output"]),
        ("clip", ["image_embeds"]),
        ("dense", ["last_hidden_state"]),
    ],
)
def test_all_outputs_by_name(kind, options, name, keys):
    pixels, outputs = expected(name)
    found = kind.from_pretrained(FOLDERS / name / "exported", **options)(pixel_values=pixels)
    assert set(keys) <= set(outputs)
    for key, value in outputs.items():
        np.testing.assert_allclose(found[key], value, atol=1e-4)
