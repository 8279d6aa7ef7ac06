"""AIMv2: RMS norms, gated MLPs, and a head with one learned query."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Aimv2Model, Aimv2VisionModel

from tests.support import slow_reference as slow
from tests.support.family_case import FamilyCase, Inputs, Row
from tests.support.slow_anatomies import clip_like, patches
from tests.support.slow_model import Outputs
from tests.support.slow_parts import Weights, layer_norm, linear


def embed(weights: Weights, inputs: Inputs) -> Tensor:
    x = layer_norm(
        weights, "embeddings.rms_norm", patches(weights, "embeddings.patch_embed", inputs["pixel_values"]), 1e-5
    )
    return x + weights["embeddings.position_embedding.weight"]


def head(weights: Weights, root: str, x: Tensor, sizes: Tensor) -> Outputs:
    """The query attends to the tokens, each as often as it counts."""
    x = layer_norm(weights, "rms_norm", x, 1e-5)
    k, v = (linear(weights, f"head.{name}", x) for name in ("k_proj", "v_proj"))
    mixed = slow.attention(weights["head.cls_token"][0], k, v, 4, 8**-0.5, sizes)
    return {"last_hidden_state": x, "pooler_output": linear(weights, "head.output_proj", mixed)[0]}


CASE = FamilyCase(
    "aimv2",
    encoder=Aimv2VisionModel,
    rows=(
        Row(
            Aimv2VisionModel,
            clip_like(
                "",
                head,
                embed=embed,
                prefix=0,
                norms=("rms_norm1", "rms_norm2"),
                qkv=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
                out="attention.out_proj",
                mlp=("ffn.up_proj", "ffn.down_proj"),
                gate="ffn.gate_proj",
                activation=torch.nn.functional.silu,
            ),
            "pooler_output",
        ),
    ),
    others=(Aimv2Model,),
)
