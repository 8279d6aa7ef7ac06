"""AST: spectrograms in overlapping patches; what is read is the mean of CLS and distillation token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import ASTForAudioClassification, ASTModel

from dtem_hf import BadValue, ToMeConfig, attach
from tests.support.family_case import PATCH, FamilyCase, Inputs, Row
from tests.support.slow_anatomies import vit_like
from tests.support.slow_model import Outputs
from tests.support.slow_parts import Weights, layer_norm, linear


STRIDE = 3


def spectrograms(count: int, time: int = 32, frequency: int = 32) -> Inputs:
    """Noise: [count, time, frequency]."""
    return {"input_values": torch.randn(count, time, frequency, generator=torch.Generator().manual_seed(2))}


def spelled(fields: dict[str, Any]) -> dict[str, Any]:
    """A spectrogram is as long and as high as an image."""
    fields = dict(fields)
    side = fields.pop("image_size")
    return {**fields, "max_length": side, "num_mel_bins": side, "frequency_stride": STRIDE, "time_stride": STRIDE}


def embed(root: str) -> Callable[[Weights, Inputs], Tensor]:
    """Patches that begin every three bins and frames, row by row of frequencies."""

    def embedded(weights: Weights, inputs: Inputs) -> Tensor:
        image, begin = inputs["input_values"].T, root + "embeddings."
        kernel, bias = (weights[f"{begin}patch_embeddings.projection.{part}"] for part in ("weight", "bias"))
        flat = [
            image[i : i + PATCH, j : j + PATCH].flatten()
            for i in range(0, image.shape[0] - PATCH + 1, STRIDE)
            for j in range(0, image.shape[1] - PATCH + 1, STRIDE)
        ]
        specials = [weights[begin + name][0] for name in ("cls_token", "distillation_token")]
        x = torch.cat([*specials, torch.stack(flat) @ kernel.flatten(1).T + bias])
        return x + weights[begin + "position_embeddings"][0]

    return embedded


def bare_head(weights: Weights, x: Tensor, sizes: Tensor) -> Outputs:
    x = layer_norm(weights, "layernorm", x, 1e-12)
    return {"last_hidden_state": x, "pooler_output": x[:2].mean(dim=0)}


def logits(weights: Weights, x: Tensor, sizes: Tensor) -> Outputs:
    pooled = layer_norm(weights, ROOT + "layernorm", x, 1e-12)[:2].mean(dim=0)
    return {"logits": linear(weights, "classifier.dense", layer_norm(weights, "classifier.layernorm", pooled, 1e-12))}


ROOT = "audio_spectrogram_transformer."
CASE = FamilyCase(
    "audio_spectrogram_transformer",
    encoder=ASTModel,
    rows=(
        Row(ASTModel, vit_like("", bare_head, prefix=2, embed=embed("")), "pooler_output"),
        Row(ASTForAudioClassification, vit_like(ROOT, logits, prefix=2, embed=embed(ROOT)), variant="classifier"),
    ),
    inputs=spectrograms,
    spelled=spelled,
)


def test_another_size_is_refused() -> None:
    model = attach(CASE.make(ASTModel), ToMeConfig(r=9))
    with pytest.raises(BadValue, match=r"image_size=48: none: the config's max_length and num_mel_bins set the size"):
        model.merge_plan(image_size=48)


def test_the_published_shapes_have_1214_tokens() -> None:
    """128 bins and 1,024 frames in patches of 16, ten apart; a layer merges at most half of what reaches it."""
    config = CASE.config(ASTModel)
    config.patch_size, config.frequency_stride, config.time_stride = 16, 10, 10
    config.num_mel_bins, config.max_length = 128, 1024
    plan = attach(ASTModel(config), ToMeConfig(r=5000)).merge_plan()
    assert plan.num_tokens == 1214
    assert plan.tokens == [608, 305, 154, 78]
