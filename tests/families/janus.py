"""Janus's vision tower."""

from __future__ import annotations

import pytest
from torch import Tensor
from transformers import JanusVisionModel

from dtem_hf import ToMeConfig, UnsupportedModelError, attach
from tests.support.family_case import FamilyCase, Row
from tests.support.slow_anatomies import clip_like
from tests.support.slow_model import Outputs
from tests.support.slow_parts import Weights, gelu, layer_norm


def janus_head(weights: Weights, root: str, x: Tensor, sizes: Tensor) -> Outputs:
    """All tokens behind the last norm."""
    return {"last_hidden_state": layer_norm(weights, root + "post_layernorm", x, 1e-6)}


CASE = FamilyCase(
    "janus",
    encoder=JanusVisionModel,
    rows=(
        Row(
            JanusVisionModel,
            clip_like("", janus_head, prefix=0, out="self_attn.projection_layer", activation=gelu, eps=1e-6),
            "last_hidden_state",
        ),
    ),
)


def test_normalised_keys_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="use_qk_norm=True"):
        attach(CASE.make(JanusVisionModel, use_qk_norm=True), ToMeConfig(r=9))
