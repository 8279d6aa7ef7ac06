"""SigLIP: no CLS token; a probe attends to the tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import SiglipForImageClassification, SiglipModel, SiglipVisionModel

from tests.support import slow_reference as slow
from tests.support.family_case import FamilyCase, Row
from tests.support.slow_anatomies import clip_like, mean
from tests.support.slow_model import Anatomy, Outputs
from tests.support.slow_parts import Weights, layer_norm, linear, tanh_gelu


def siglip_head(weights: Weights, root: str, x: Tensor, sizes: Tensor) -> Outputs:
    """A probe attends to the tokens, each as often as it counts."""
    x = layer_norm(weights, root + "post_layernorm", x, 1e-6)
    inside = root + "head."
    maps = zip(
        weights[inside + "attention.in_proj_weight"].chunk(3),
        weights[inside + "attention.in_proj_bias"].chunk(3),
        (weights[inside + "probe"][0], x, x),
        strict=True,
    )
    q, k, v = (tokens @ weight.T + bias for weight, bias, tokens in maps)
    pooled = linear(weights, inside + "attention.out_proj", slow.attention(q, k, v, 4, 8**-0.5, sizes))
    h = tanh_gelu(linear(weights, inside + "mlp.fc1", layer_norm(weights, inside + "layernorm", pooled, 1e-6)))
    pooled = pooled + linear(weights, inside + "mlp.fc2", h)
    return {"last_hidden_state": x, "pooler_output": pooled[0]}


def siglip_classifier_head(weights: Weights, root: str, x: Tensor, sizes: Tensor) -> Outputs:
    x = layer_norm(weights, root + "post_layernorm", x, 1e-6)
    return {"logits": linear(weights, "classifier", mean(x, sizes))}


def siglip(root: str = "", head: Callable[..., Outputs] = siglip_head, **changes: Any) -> Anatomy:
    return clip_like(root, head, prefix=0, activation=tanh_gelu, eps=1e-6, **changes)


CASE = FamilyCase(
    "siglip",
    encoder=SiglipVisionModel,
    rows=(
        Row(SiglipVisionModel, siglip(), "pooler_output"),
        Row(SiglipForImageClassification, siglip("vision_model.", siglip_classifier_head), variant="classifier"),
    ),
    others=(SiglipModel,),
)
