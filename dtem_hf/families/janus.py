"""Janus's vision tower: CLIP's layers, and no prefix token.

Its `pooler_output`, which Janus does not read, is of the first token that is left, whatever patches that stands for.
"""

from transformers.models.janus.modeling_janus import JanusVisionModel

from .clip import CLIP_LAYER
from .internvl import InternVLFamily


FAMILY = InternVLFamily(
    encoders={JanusVisionModel: "encoder.layers"},
    anatomy=CLIP_LAYER,
    models={JanusVisionModel: "tokens"},
    num_prefix_tokens=0,
)
