"""DeiT: a distillation token behind the CLS token."""

from __future__ import annotations

from torch import Tensor
from transformers import DeiTForImageClassification, DeiTForImageClassificationWithTeacher, DeiTModel

from tests.support.family_case import FamilyCase, Row
from tests.support.slow_anatomies import first_token_logits, vit_like
from tests.support.slow_model import Outputs
from tests.support.slow_parts import Weights, layer_norm, linear


def teacher_head(weights: Weights, x: Tensor, sizes: Tensor) -> Outputs:
    x = layer_norm(weights, "deit.layernorm", x, 1e-12)
    ours, theirs = linear(weights, "cls_classifier", x[0]), linear(weights, "distillation_classifier", x[1])
    return {"logits": (ours + theirs) / 2, "cls_logits": ours, "distillation_logits": theirs}


TOKENS = ("cls_token", "distillation_token")
CASE = FamilyCase(
    "deit",
    encoder=DeiTModel,
    rows=(
        Row(DeiTForImageClassification, vit_like("deit.", first_token_logits("deit.layernorm"), TOKENS)),
        Row(DeiTForImageClassificationWithTeacher, vit_like("deit.", teacher_head, TOKENS), variant="teacher"),
    ),
)
