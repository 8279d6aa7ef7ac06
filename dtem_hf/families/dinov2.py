"""DINOv2: one CLS token, then the patches; layer scale; a classifier that averages, and a backbone for dense heads."""

from dataclasses import replace

from transformers.models.dinov2 import modeling_dinov2
from transformers.models.dinov2.modeling_dinov2 import (
    Dinov2Backbone,
    Dinov2Encoder,
    Dinov2ForImageClassification,
    Dinov2Model,
)

from .anatomy import Anatomy
from .family import Family
from .masked_attention import MaskedAttention


DINOV3_LAYER = Anatomy(
    norm1="norm1",
    attention="attention",
    norm2="norm2",
    mlp="mlp",
    query="attention.q_proj",
    key="attention.k_proj",
    heads="attention.num_heads",
    branch1=("layer_scale1", "drop_path"),
    branch2=("layer_scale2", "drop_path"),
)
DINOV2_LAYER = replace(DINOV3_LAYER, heads="attention.num_attention_heads")
# Older versions of transformers put the projections in an inner module, which takes no mask.
DINOV2_LAYER_PARTS: dict[str, type] = {}
if hasattr(modeling_dinov2, "Dinov2SelfAttention"):
    inner = "attention.attention."
    DINOV2_LAYER = replace(DINOV3_LAYER, query=inner + "query", key=inner + "key", heads=inner + "num_attention_heads")
    DINOV2_LAYER_PARTS = {"attention.attention": MaskedAttention}

FAMILY = Family(
    encoders={Dinov2Model: "encoder.layer", Dinov2Encoder: "layer"},
    anatomy=DINOV2_LAYER,
    models={Dinov2Model: "tokens", Dinov2ForImageClassification: "mean", Dinov2Backbone: "grid"},
    layer_parts=DINOV2_LAYER_PARTS,
)
