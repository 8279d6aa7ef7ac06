"""Qwen2-VL's vision tower: rows of patches of images and frames, with rotary positions; no prefix token."""

from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from .anatomy import Anatomy
from .packed_rows import PackedRowsAttention, PackedRowsFamily, PackedRowsMerging


QWEN_LAYER = Anatomy(
    norm1="norm1",
    attention="attn",
    norm2="norm2",
    mlp="mlp",
    query="attn.qkv",
    key="attn.qkv",
    heads="attn.num_heads",
    packed=True,
)
FAMILY = PackedRowsFamily(
    encoders={Qwen2VisionTransformerPretrainedModel: "blocks"},
    anatomy=QWEN_LAYER,
    models={Qwen2VisionTransformerPretrainedModel: "rows"},
    num_prefix_tokens=0,
    width_field="embed_dim",
    layer_parts={"attn": PackedRowsAttention},
    layer_merging=PackedRowsMerging,
)
