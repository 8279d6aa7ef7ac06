"""Attention that hands out the keys it computes, takes a rider along, and computes no more rows than are read.

The same projections and the same attention function as in the module of transformers that it is mixed into; the
module's own forward pass runs wherever a layer asks for neither.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.vit.modeling_vit import eager_attention_forward

from .packing import project


@dataclass
class AttentionPass:
    """What a layer asks of its attention: `num_rows` first rows (None: all). It gets the `keys`, [B, n, H · d].

    With `packs`, the projections may be one product, which rounds otherwise than three. A `rider` is another linear
    map of the same input that may be in it; `ridden` is what it made, or None where it still has to run.
    """

    num_rows: int | None = None
    packs: bool = False
    rider: nn.Module | None = None
    keys: Tensor | None = None
    ridden: Tensor | None = None


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
        rows, packed = hidden_states, None
        if attention_pass.num_rows is not None:
            rows = hidden_states[:, : attention_pass.num_rows]
        elif attention_pass.packs:
            linears = [self.q_proj, self.k_proj, self.v_proj]
            linears += [] if attention_pass.rider is None else [attention_pass.rider]
            packed = project(self, linears, hidden_states)
        if packed is None:
            projected: Any = self.q_proj(rows), self.k_proj(hidden_states), self.v_proj(hidden_states)
        else:
            projected = packed[:3]
            attention_pass.ridden = packed[3] if len(packed) > 3 else None
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
