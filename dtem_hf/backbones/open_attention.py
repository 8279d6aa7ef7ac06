"""Attention that hands out the keys it computes, and computes no more rows than are read.

The same projections and the same attention function as in the module of transformers that it is mixed into; the
module's own forward pass runs wherever a layer asks for neither.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.vit.modeling_vit import eager_attention_forward


@dataclass
class AttentionPass:
    """What a layer asks of its attention: `num_rows` first rows (None: all). It gets the `keys`, [B, n, H · d]."""

    num_rows: int | None = None
    keys: Tensor | None = None


class OpenAttention:
    """Mixed into a self-attention with `q_proj`, `k_proj`, `v_proj` and `o_proj`, and nothing in between."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        attention_pass: AttentionPass | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if attention_pass is None:
            return super().forward(hidden_states, attention_mask, **kwargs)  # type: ignore[misc]
        rows = hidden_states
        if attention_pass.num_rows is not None:
            rows = hidden_states[:, : attention_pass.num_rows]
        projected = self.q_proj(rows), self.k_proj(hidden_states), self.v_proj(hidden_states)
        attention_pass.keys = projected[1]
        query, key, value = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in projected)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        mixed, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(mixed.reshape(*rows.shape[:-1], -1).contiguous()), weights


def opens(attention: Any, encoder_class: type) -> bool:
    """Whether an attention module is the one that transformers wrote for an encoder, and may be opened."""
    return type(attention).__module__ == encoder_class.__module__
