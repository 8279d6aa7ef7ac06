"""ViT, and the Hub's DeiT checkpoints without a distillation token: one CLS token, then the patches."""

from transformers.models.vit.modeling_vit import ViTForImageClassification, ViTModel

from .anatomy import Anatomy
from .family import Family


VIT_LAYER = Anatomy(
    norm1="layernorm_before",
    attention="attention",
    norm2="layernorm_after",
    mlp="mlp",
    query="attention.q_proj",
    key="attention.k_proj",
    heads="attention.num_attention_heads",
    branch1=("dropout",),
    branch2=("dropout",),
)
FAMILY = Family(
    encoders={ViTModel: "layers"},
    anatomy=VIT_LAYER,
    models={ViTModel: "tokens", ViTForImageClassification: "tokens"},
)
