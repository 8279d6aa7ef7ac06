"""Qwen3-VL's vision tower."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from tests.support.family_case import FamilyCase, Inputs, Row
from tests.support.packed_rows import NOT_EXPORTED, cells, merger, packed, rows_of, tower
from tests.support.slow_parts import Weights, tanh_gelu


def spelled(fields: dict[str, Any]) -> dict[str, Any]:
    names = {"num_hidden_layers": "depth", "num_attention_heads": "num_heads"}
    kept = {names.get(name, name): value for name, value in fields.items() if name != "image_size"}
    patches = {"num_position_embeddings": fields["num_patches"]}
    return {**kept, **patches, "out_hidden_size": 16, "deepstack_visual_indexes": [0, 1]}


def positions(weights: Weights, inputs: Inputs) -> Tensor:
    """Learned ones, of a square grid whose corners lie on those of the image; between them, by distance."""
    table, (_, height, width) = weights["pos_embed.weight"], inputs["grid_thw"].flatten().tolist()
    side = round(len(table) ** 0.5)
    found = []
    for i, j in cells(inputs["grid_thw"]):
        y, x = i * (side - 1) / (height - 1), j * (side - 1) / (width - 1)
        found.append(
            sum(
                (1 - abs(y - row)) * (1 - abs(x - column)) * table[row * side + column]
                for row in range(side)
                for column in range(side)
                if abs(y - row) < 1 and abs(x - column) < 1
            )
        )
    return torch.stack(found)


NAMES = ("norm", "linear_fc1", "linear_fc2")
CASE = FamilyCase(
    "qwen3_vl",
    encoder=Qwen3VLVisionModel,
    rows=(
        Row(
            Qwen3VLVisionModel,
            tower(
                positions,
                lambda weights, x: merger(weights, "merger", x, *NAMES),
                mlp=("mlp.linear_fc1", "mlp.linear_fc2"),
                activation=tanh_gelu,
            ),
            "pooler_output",
        ),
    ),
    inputs=packed,
    spelled=spelled,
    uneven=lambda count: rows_of([(1, 4, 8)] * count),
    lacking={"compile": NOT_EXPORTED, "export": NOT_EXPORTED, "onnx": NOT_EXPORTED},
)


def tap(weights: Weights, index: int, x: Tensor) -> Tensor:
    return merger(weights, f"deepstack_merger_list.{index}", x, *NAMES, after=True)
