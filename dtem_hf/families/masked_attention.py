"""Attention for modules of transformers that take no mask: their own without one, the same with one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import ops


def attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scaling: float, dropout: float, weights: bool
) -> tuple[Tensor, Tensor | None]:
    """Attention, with an additive mask or none: [B, H, n, d] three times -> [B, n, H·d], and the weights if wanted."""
    if not weights:
        return ops.biased_attention(query, key, value, bias, scaling, dropout).transpose(1, 2).flatten(2), None
    scores = (query @ key.transpose(2, 3)) * scaling
    scores = scores if bias is None else scores + bias
    shares = F.dropout(scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype), dropout, training=dropout > 0)
    return (shares @ value).transpose(1, 2).flatten(2), shares


class MaskedAttention:
    """Mixed into a self-attention with `query`, `key` and `value`, which has no output projection of its own."""

    def forward(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        if attention_mask is None:
            return super().forward(hidden_states, **kwargs)  # type: ignore[misc]
        heads = self.num_attention_heads
        q, k, v = (
            linear(hidden_states).unflatten(-1, (heads, -1)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        dropout = self.dropout_prob if self.training else 0.0
        return attend(
            q, k, v, attention_mask, q.shape[-1] ** -0.5, dropout, self.config._attn_implementation == "eager"
        )
