"""CLIP."""

from __future__ import annotations

from torch import Tensor
from transformers import CLIPForImageClassification, CLIPModel, CLIPVisionModel, CLIPVisionModelWithProjection

from tests.support.family_case import FamilyCase, Row
from tests.support.slow_anatomies import clip_like, mean
from tests.support.slow_model import Outputs
from tests.support.slow_parts import Weights, layer_norm, linear


def clip_head(weights: Weights, root: str, x: Tensor, sizes: Tensor) -> Outputs:
    pooled = layer_norm(weights, root + "post_layernorm", x[0], 1e-5)
    if "visual_projection.weight" in weights:
        return {"last_hidden_state": x, "image_embeds": linear(weights, "visual_projection", pooled)}
    return {"last_hidden_state": x, "pooler_output": pooled}


def clip_classifier_head(weights: Weights, root: str, x: Tensor, sizes: Tensor) -> Outputs:
    return {"logits": linear(weights, "classifier", mean(x[1:], sizes[1:]))}


CASE = FamilyCase(
    "clip",
    encoder=CLIPVisionModel,
    rows=(
        Row(CLIPVisionModel, clip_like("", clip_head), "pooler_output"),
        Row(CLIPVisionModelWithProjection, clip_like("vision_model.", clip_head), "image_embeds", "projection"),
        Row(CLIPForImageClassification, clip_like("vision_model.", clip_classifier_head), variant="classifier"),
    ),
    others=(CLIPModel,),
    vision={"projection_dim": 16},
)
