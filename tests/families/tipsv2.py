"""TIPSv2."""

from dataclasses import replace

from torch import Tensor
from transformers.models.tipsv2.modeling_tipsv2 import Tipsv2Model, Tipsv2VisionModel

from tests.support.family_case import FamilyCase, Row
from tests.support.slow_anatomies import dinov2_like
from tests.support.slow_model import Outputs
from tests.support.slow_parts import Weights, layer_norm


def head(weights: Weights, x: Tensor, sizes: Tensor) -> Outputs:
    x = layer_norm(weights, "layernorm", x, 1e-6)
    return {"last_hidden_state": x, "pooler_output": x[0]}


CASE = FamilyCase(
    "tipsv2",
    encoder=Tipsv2VisionModel,
    rows=(Row(Tipsv2VisionModel, replace(dinov2_like("", registers=3), head=head), "pooler_output"),),
    others=(Tipsv2Model,),
    vision={"mlp_ratio": 2, "num_register_tokens": 3},
    lacking={"bfloat16": "its two towers return numbers of two precisions"},
)
