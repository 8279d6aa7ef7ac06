"""Attention with a mask for modules of transformers that take none. Without a mask, their own forward pass runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.clip.modeling_clip import eager_attention_forward


def by_heads(x: Tensor, num_heads: int, *projections: Any) -> Iterator[Tensor]:
    """Every projection's output for tokens [B, n, D], split into heads: [B, H, n, d] each."""
    return (projection(x).unflatten(-1, (num_heads, -1)).transpose(1, 2) for projection in projections)


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scaling: float, dropout: float
) -> tuple[Tensor, Tensor | None]:
    """A module's attention with an additive mask, or none: [B, H, n, d] three times -> [B, n, H·d], and the weights.

    The weights are None unless the implementation is "eager". `dropout` is the rate in training.
    """
    eager = module.config._attn_implementation == "eager"
    function: Any = eager_attention_forward if eager else sdpa_attention_forward
    rate = dropout if module.training else 0.0
    mixed, weights = function(module, query, key, value, bias, scaling=scaling, dropout=rate, is_causal=False)
    return mixed.flatten(2), weights  # [B, n, H, d] -> [B, n, H·d]


class MaskedAttention:
    """Mixin for a self-attention with `query`, `key` and `value`, and without an output projection."""

    def forward(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        if attention_mask is None:
            return super().forward(hidden_states, **kwargs)  # type: ignore[misc]
        q, k, v = by_heads(hidden_states, self.num_attention_heads, self.query, self.key, self.value)
        return attend(self, q, k, v, attention_mask, q.shape[-1] ** -0.5, self.dropout_prob)


class PackedMaskedAttention:
    """Mixin for a self-attention with one projection `qkv`, and the output projection `projection`."""

    def forward(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        if attention_mask is None:
            return super().forward(hidden_states, **kwargs)  # type: ignore[misc]
        # [B, n, 3 · H · d] -> 3 × [B, H, n, d]
        q, k, v = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        rate = self.dropout.p if hasattr(self, "dropout") else self.attention_dropout
        mixed, weights = attend(self, q, k, v, attention_mask, self.scale, rate)
        return self.projection(mixed), weights
