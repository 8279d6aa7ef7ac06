"""Pixio: as many CLS tokens as the config says, whose mean is what is read."""

from dataclasses import replace

from torch import Tensor
from transformers import PixioModel

from tests.support.family_case import FamilyCase, Row
from tests.support.slow_anatomies import vit_like
from tests.support.slow_model import Outputs
from tests.support.slow_parts import Weights, layer_norm


def head(weights: Weights, x: Tensor, sizes: Tensor) -> Outputs:
    x = layer_norm(weights, "layernorm", x, 1e-6)
    return {"last_hidden_state": x, "pooler_output": x[:3].mean(dim=0)}


CASE = FamilyCase(
    "pixio",
    encoder=PixioModel,
    rows=(Row(PixioModel, replace(vit_like("", head, eps=1e-6), prefix=3), "pooler_output"),),
    vision={"n_cls_tokens": 3, "mlp_ratio": 2},
)
