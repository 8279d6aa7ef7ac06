"""ViT-MSN: a ViT without a pooler."""

from __future__ import annotations

from transformers.models.vit_msn.modeling_vit_msn import ViTMSNForImageClassification, ViTMSNModel

from .vit import ViTLike


class ViTMSNFamily(ViTLike):
    encoder_class = ViTMSNModel
    models = {"AutoModel": (ViTMSNModel,), "AutoModelForImageClassification": (ViTMSNForImageClassification,)}
    prefix_readers = (ViTMSNForImageClassification,)
