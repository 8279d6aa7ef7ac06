"""ViT's layer as older versions of transformers build it; several families still have this layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .anatomy import Anatomy
from .layer import LayerMerging
from .masked_attention import MaskedAttention


OLDER_VIT_LAYER = Anatomy(
    norm1="layernorm_before",
    attention="attention",
    norm2="layernorm_after",
    mlp="intermediate",
    query="attention.attention.query",
    key="attention.attention.key",
    heads="attention.attention.num_attention_heads",
)
OLDER_VIT_PARTS: dict[str, type] = {"attention.attention": MaskedAttention}


class OlderViTMerging(LayerMerging):
    """The second half of the MLP adds the residual itself."""

    def feed_forward(self: Any, x: Tensor, parts: Anatomy) -> Tensor:
        grown: Tensor = self.output(getattr(self, parts.mlp)(getattr(self, parts.norm2)(x)), x)
        return grown
