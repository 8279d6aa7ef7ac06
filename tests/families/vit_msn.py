"""ViT-MSN."""

from transformers import ViTMSNForImageClassification, ViTMSNModel

from tests.support.family_case import FamilyCase, Row
from tests.support.slow_anatomies import first_token_logits, vit_like


CASE = FamilyCase(
    "vit_msn",
    encoder=ViTMSNModel,
    rows=(Row(ViTMSNForImageClassification, vit_like("vit.", first_token_logits("vit.layernorm", 1e-6), eps=1e-6)),),
)
