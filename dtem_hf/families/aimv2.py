"""AIMv2: layers with RMS norms and gated MLPs; no prefix token; a head that attends to the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.aimv2.modeling_aimv2 import (
    Aimv2AttentionPoolingHead,
    Aimv2Model,
    Aimv2VisionModel,
)

from ..scope import current_state
from .anatomy import Anatomy, linear_cost
from .family import Family
from .masked_attention import by_heads


class WeighedHead:
    """Mixin for the pooling head, whose attention takes no mask: a token of size m counts m times."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        state = current_state()
        bias = None if state is None else state.final_bias(hidden_states.dtype)
        if bias is None:
            return super().forward(hidden_states)  # type: ignore[misc]
        k, v = by_heads(hidden_states, self.num_heads, self.k_proj, self.v_proj)
        query = self.cls_token.expand(k.shape[0], -1, -1).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(query, k, v, attn_mask=bias.to(k.device))
        pooled: Tensor = self.output_proj(mixed.flatten(1))  # of one query: [B, H, 1, d] -> [B, H · d]
        return pooled


class Aimv2Family(Family):
    """The head has one query; keys, values, scores and weighted sums count per output token."""

    def outside_cost(self, modules: Sequence[nn.Module]) -> tuple[int, ...]:
        stem, head, tail = super().outside_cost(modules)
        for pooling in (m for m in modules if isinstance(m, Aimv2AttentionPoolingHead)):
            projections = linear_cost((pooling.k_proj, pooling.v_proj))
            head, tail = head - projections, tail + projections + 2 * pooling.hidden_size
        return stem, head, tail


FAMILY = Aimv2Family(
    encoders={Aimv2VisionModel: "encoder.layers"},
    anatomy=Anatomy(
        norm1="rms_norm1",
        attention="attention",
        norm2="rms_norm2",
        mlp="ffn",
        query="attention.q_proj",
        key="attention.k_proj",
        heads="attention.num_heads",
    ),
    models={Aimv2Model: "tokens", Aimv2VisionModel: "tokens"},
    num_prefix_tokens=0,
    composites=(Aimv2Model,),
    encoder_parts={"head": WeighedHead},
)
