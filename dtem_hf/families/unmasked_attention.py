"""The size bias in attention implementations of transformers that take no additive mask over keys.

FlashAttention reads a mask as padding, and FlexAttention needs one row of the mask per query. `enable_size_bias`
registers such an implementation again under its own name, as a function that takes the mask of log sizes,
[B, 1, 1, n], exactly. Every other call goes to transformers' function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.flex_attention import flex_attention_forward

from .. import ops
from ..errors import UnsupportedModelError
from ..scope import current_state


# Implementations that add a float mask to their scores already.
_MASKED = ("eager", "sdpa")


class _WithBias:
    """A function of transformers' attention interface that also takes an additive mask [B, 1 or H, 1, n].

    The mask becomes extra features of the keys; the queries have ones there, so that any kernel adds the mask.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> Any:
        is_bias = (
            isinstance(attention_mask, Tensor) and attention_mask.dim() == 4 and attention_mask.is_floating_point()
        )
        by_query = is_bias and attention_mask.shape[2] > 1 and attention_mask.stride(2) > 0  # 0: one row, expanded
        if not is_bias or (by_query and current_state() is None):  # the mask of another model
            return self.function(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        if by_query:
            raise UnsupportedModelError(
                f"attn_implementation={module.config._attn_implementation!r}: {type(module).__name__} has a bias for "
                "every pair of query and key, which this implementation cannot add; use sdpa."
            )
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        extended = ops.extend_keys(query, key, value, attention_mask[:, :, :1], scaling)
        mixed, weights = self.function(module, *extended, None, scaling=scaling, **kwargs)
        return mixed[..., : value.shape[-1]], weights


_SERVED = (flash_attention_forward, flex_attention_forward)


def enable_size_bias(name: Any) -> None:
    """Make an attention implementation add the size bias to its scores; `name` is its name in transformers.

    It works for FlexAttention and FlashAttention, with the Hub's kernels that transformers calls as FlashAttention.
    Raises UnsupportedModelError for any other. A name that is not registered is ignored: transformers loads or refuses
    it.
    """
    if not isinstance(name, str) or name in _MASKED:
        return
    function = AttentionInterface().get(name)
    if isinstance(function, _WithBias):
        return
    if function in _SERVED:
        AttentionInterface.register(name, _WithBias(function))
    elif function is not None or name.startswith("paged|"):
        raise UnsupportedModelError(
            f"attn_implementation={name!r}: token sizes enter attention as an additive mask, which this one does not "
            "add; use one of eager, sdpa, flash_attention_2, flash_attention_3, flex_attention."
        )
