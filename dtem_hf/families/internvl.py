"""InternVL's vision tower: ViT's layers with layer scale; CLS, then the patches."""

from dataclasses import replace

from transformers.models.internvl.modeling_internvl import InternVLVisionModel

from .family import Family
from .vit import VIT_LAYER


PLAIN_KEYS = {"use_qk_norm": (False, "tokens would be compared by keys that are not normalised.")}
FAMILY = Family(
    encoders={InternVLVisionModel: "encoder.layer"},
    anatomy=replace(VIT_LAYER, heads="attention.num_heads", branch1=("lambda_1",), branch2=("dropout", "lambda_2")),
    models={InternVLVisionModel: "tokens"},
    required=PLAIN_KEYS,
)
