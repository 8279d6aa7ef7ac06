"""I-JEPA: no CLS token; the classifier averages."""

from __future__ import annotations

import pytest
from torch import Tensor
from transformers import IJepaForImageClassification, IJepaModel

from dtem_hf import ToMeConfig, UnsupportedModelError, attach
from tests.support.family_case import FamilyCase, Row
from tests.support.slow_anatomies import mean, normed_tokens, vit_like
from tests.support.slow_model import Outputs
from tests.support.slow_parts import Weights, layer_norm, linear


def ijepa_head(weights: Weights, x: Tensor, sizes: Tensor) -> Outputs:
    """The patches are normalised first, and averaged then."""
    return {"logits": linear(weights, "classifier", mean(layer_norm(weights, "ijepa.layernorm", x, 1e-12), sizes))}


CASE = FamilyCase(
    "ijepa",
    encoder=IJepaModel,
    rows=(
        Row(IJepaModel, vit_like("", normed_tokens("layernorm"), ()), "last_hidden_state"),
        Row(IJepaForImageClassification, vit_like("ijepa.", ijepa_head, ()), variant="classifier"),
    ),
)


def test_a_pooler_on_a_patch_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="pooler reads the first patch"):
        attach(IJepaModel(CASE.config(IJepaModel), add_pooling_layer=True), ToMeConfig(r=9))
