"""ViT."""

from __future__ import annotations

from torch import Tensor
from transformers import ViTForImageClassification, ViTModel

from tests.support.family_case import FamilyCase, Row
from tests.support.slow_anatomies import first_token_logits, vit_like
from tests.support.slow_model import Outputs
from tests.support.slow_parts import Weights, layer_norm, linear


def vit_head(weights: Weights, x: Tensor, sizes: Tensor) -> Outputs:
    x = layer_norm(weights, "layernorm", x, 1e-12)
    return {"last_hidden_state": x, "pooler_output": linear(weights, "pooler.dense", x[0]).tanh()}


CASE = FamilyCase(
    "vit",
    encoder=ViTModel,
    rows=(
        Row(ViTForImageClassification, vit_like("vit.", first_token_logits("vit.layernorm"))),
        Row(ViTModel, vit_like("", vit_head), "pooler_output", "bare"),
    ),
)
