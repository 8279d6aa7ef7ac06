"""MetaCLIP 2."""

from torch import Tensor
from transformers.models.metaclip_2.modeling_metaclip_2 import (
    MetaClip2ForImageClassification,
    MetaClip2Model,
    MetaClip2VisionModel,
    MetaClip2VisionModelWithProjection,
)

from tests.support.family_case import FamilyCase, Row
from tests.support.slow_anatomies import clip_like, mean
from tests.support.slow_model import Outputs
from tests.support.slow_parts import Weights, layer_norm, linear


def image_embeds(weights: Weights, root: str, x: Tensor, sizes: Tensor) -> Outputs:
    """The projected CLS token."""
    pooled = layer_norm(weights, root + "post_layernorm", x[0], 1e-5)
    return {"image_embeds": linear(weights, "visual_projection", pooled)}


def mean_logits(weights: Weights, root: str, x: Tensor, sizes: Tensor) -> Outputs:
    """A classifier on the mean of the patches."""
    return {"logits": linear(weights, "classifier", mean(x[1:], sizes[1:]))}


CASE = FamilyCase(
    "metaclip_2",
    encoder=MetaClip2VisionModel,
    rows=(
        Row(MetaClip2VisionModelWithProjection, clip_like("vision_model.", image_embeds), output="image_embeds"),
        Row(MetaClip2ForImageClassification, clip_like("vision_model.", mean_logits), variant="classifier"),
    ),
    others=(MetaClip2Model, MetaClip2VisionModel),
)
