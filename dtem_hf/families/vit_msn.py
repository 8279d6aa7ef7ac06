"""ViT-MSN: a ViT without a pooler."""

from transformers.models.vit_msn.modeling_vit_msn import ViTMSNForImageClassification, ViTMSNModel

from .family import Family
from .vit import VIT_LAYER


FAMILY = Family(
    encoders={ViTMSNModel: "layers"},
    anatomy=VIT_LAYER,
    models={ViTMSNModel: "tokens", ViTMSNForImageClassification: "tokens"},
)
