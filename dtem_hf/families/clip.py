"""CLIP: the vision tower, alone or in a dual encoder, whose text tower does not change; CLS, then the patches."""

from transformers.models.clip.modeling_clip import (
    CLIPForImageClassification,
    CLIPModel,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)

from .anatomy import Anatomy
from .family import Family


CLIP_LAYER = Anatomy(
    norm1="layer_norm1",
    attention="self_attn",
    norm2="layer_norm2",
    mlp="mlp",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    heads="self_attn.num_heads",
)
FAMILY = Family(
    encoders={CLIPVisionModel: "encoder.layers"},
    anatomy=CLIP_LAYER,
    models={
        CLIPModel: "tokens",
        CLIPVisionModel: "tokens",
        CLIPVisionModelWithProjection: "tokens",
        CLIPForImageClassification: "mean",
    },
    composites=(CLIPModel,),
)
