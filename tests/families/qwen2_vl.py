"""Qwen2-VL's vision tower."""

from __future__ import annotations

from typing import Any

from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from tests.support.family_case import FamilyCase, Row
from tests.support.packed_rows import NOT_EXPORTED, merger, packed, rows_of, tower
from tests.support.slow_parts import quick_gelu


def spelled(fields: dict[str, Any]) -> dict[str, Any]:
    names = {"hidden_size": "embed_dim", "num_hidden_layers": "depth", "num_attention_heads": "num_heads"}
    kept = {names.get(name, name): value for name, value in fields.items() if name != "image_size"}
    return {**kept, "hidden_size": 16, "mlp_ratio": 2, "num_position_embeddings": fields["num_patches"]}


CASE = FamilyCase(
    "qwen2_vl",
    encoder=Qwen2VisionTransformerPretrainedModel,
    rows=(
        Row(
            Qwen2VisionTransformerPretrainedModel,
            tower(
                lambda weights, inputs: 0.0,
                lambda weights, x: merger(weights, "merger", x, "ln_q", "mlp.0", "mlp.2"),
                activation=quick_gelu,
            ),
            "pooler_output",
        ),
    ),
    inputs=packed,
    spelled=spelled,
    uneven=lambda count: rows_of([(1, 4, 8)] * count),
    lacking={"compile": NOT_EXPORTED, "export": NOT_EXPORTED, "onnx": NOT_EXPORTED},
)
