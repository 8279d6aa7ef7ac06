"""Janus's vision tower: CLIP's layers; no prefix token.

Its `pooler_output` is computed from the first merged token, whatever its patches. Janus does not use it.
"""

from transformers.models.janus.modeling_janus import JanusVisionModel

from .clip import CLIP_LAYER
from .family import Family
from .internvl import PLAIN_KEYS


FAMILY = Family(
    encoders={JanusVisionModel: "encoder.layers"},
    anatomy=CLIP_LAYER,
    models={JanusVisionModel: "tokens"},
    num_prefix_tokens=0,
    required=PLAIN_KEYS,
)
