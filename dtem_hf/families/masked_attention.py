"""Attention with a mask, for modules of transformers that take none; without one, their own forward pass runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scaling: float, dropout: float, weights: bool
) -> tuple[Tensor, Tensor | None]:
    """Attention with an additive mask, or none: [B, H, n, d] three times -> [B, n, H·d], and the weights if wanted."""
    if not weights:
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout, scale=scaling)
        return mixed.transpose(1, 2).flatten(2), None
    scores = (query @ key.transpose(2, 3)) * scaling
    scores = scores if bias is None else scores + bias
    shares = F.dropout(scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype), dropout, training=dropout > 0)
    return (shares @ value).transpose(1, 2).flatten(2), shares


class MaskedAttention:
    """Mixed into a self-attention with `query`, `key` and `value`, and no output projection."""

    def forward(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        if attention_mask is None:
            return super().forward(hidden_states, **kwargs)  # type: ignore[misc]
        q, k, v = (
            linear(hidden_states).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        dropout, eager = self.dropout_prob if self.training else 0.0, self.config._attn_implementation == "eager"
        return attend(q, k, v, attention_mask, q.shape[-1] ** -0.5, dropout, eager)


class PackedMaskedAttention:
    """Mixed into a self-attention with one projection `qkv`, and the output projection `projection`."""

    def forward(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        if attention_mask is None:
            return super().forward(hidden_states, **kwargs)  # type: ignore[misc]
        # [B, n, 3 · H · d] -> 3 × [B, H, n, d]
        q, k, v = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        rate = self.dropout.p if hasattr(self, "dropout") else self.attention_dropout
        dropout, eager = rate if self.training else 0.0, self.config._attn_implementation == "eager"
        mixed, weights = attend(q, k, v, attention_mask, self.scale, dropout, eager)
        return self.projection(mixed), weights
