"""Attention that hands out the keys it computes, and computes no more rows than are read.

The same projections and the same attention function as in the module of transformers that it is mixed into, whose own
forward pass runs wherever it is called without an `AttentionPass`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .bare_modules import as_product, multiplies_faster
from .masked_attention import attend


@dataclass
class AttentionPass:
    """What a layer asks of its attention: `num_rows` first rows (None: all), of tokens that were `merged` or not.

    It gets the `keys`, [B, n, H · d]; None where attention does not hand them out.
    """

    num_rows: int | None = None
    merged: bool = False
    keys: Tensor | None = None

    def rows(self, x: Tensor) -> Tensor:
        """The rows that attention computes, of what goes past it: [B, n, D] -> [B, n or num_rows, D]."""
        return x if self.num_rows is None else x[:, : self.num_rows]


class OpenAttention:
    """Mixed into a self-attention with `q_proj`, `k_proj`, `v_proj`, one more projection, and nothing in between."""

    output_name: ClassVar = "o_proj"
    scaling_name: ClassVar = "scaling"
    dropout_name: ClassVar = "attention_dropout"

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        attention_pass: AttentionPass | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if attention_pass is None:
            return super().forward(hidden_states, attention_mask=attention_mask, **kwargs)  # type: ignore[misc]
        rows = attention_pass.rows(hidden_states)
        linears = self.q_proj, self.k_proj, self.v_proj, getattr(self, self.output_name)
        fast = attention_pass.merged and not self.training and multiplies_faster(rows, *linears)
        to_query, to_key, to_value, to_output = map(as_product, linears) if fast else linears
        projected = to_query(rows), to_key(hidden_states), to_value(hidden_states)
        attention_pass.keys = projected[1]
        query, key, value = (x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2) for x in projected)
        scaling, dropout = getattr(self, self.scaling_name), getattr(self, self.dropout_name) if self.training else 0.0
        interface = attention_function(self)
        if interface is sdpa_attention_forward and not kwargs:  # without the cases of decoders, which it looks into
            mixed, weights = attend(query, key, value, attention_mask, scaling, dropout, weights=False)
            return to_output(mixed), weights
        mixed, weights = interface(self, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
        return to_output(mixed.reshape(*rows.shape[:-1], -1).contiguous()), weights


def attention_function(attention: Any) -> Any:
    """The function that computes a module's attention at present."""
    implementation = attention.config._attn_implementation
    eager: Any = _eager_attention(attention) if implementation == "eager" else None
    return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)


def has_stock_function(attention: Any) -> bool:
    """Whether that is one that transformers wrote, and not somebody's in its place."""
    # By where its code stands: a wrapped function has the name and module of what it wraps.
    written_in = getattr(attention_function(attention), "__globals__", {}).get("__name__", "")
    return written_in.startswith("transformers.")


def _eager_attention(attention: Any) -> Any:
    """The function for eager attention that stands beside the stock class, whatever was derived from that since."""
    for cls in type(attention).__mro__:
        if cls.__module__.startswith("transformers.models."):
            return sys.modules[cls.__module__].eager_attention_forward
    raise AssertionError(f"{type(attention).__name__} is not derived from a class of transformers")


class OpenCLIPAttention(OpenAttention):
    """The same, under the names that CLIP and its kin give to the parts."""

    output_name = "out_proj"
    scaling_name = "scale"
    dropout_name = "dropout"


def opens(attention: Any, encoder_class: type) -> bool:
    """Whether an attention module is the one that transformers wrote for an encoder, and may be opened."""
    return type(attention).__module__ == encoder_class.__module__ and hasattr(attention, "q_proj")
