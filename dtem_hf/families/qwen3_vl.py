"""Qwen3-VL's vision tower: Qwen2-VL's layers; the language model reads the tokens of some; no prefix token."""

from dataclasses import replace

from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from .qwen2_vl import FAMILY as QWEN2_VL


FAMILY = replace(
    QWEN2_VL,
    encoders={Qwen3VLVisionModel: "blocks"},
    models={Qwen3VLVisionModel: "rows"},
    width_field="hidden_size",
)
