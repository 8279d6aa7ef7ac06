"""A layer's forward pass without the machinery of its modules, where nobody would notice.

For one image, half of what a layer takes beside its matrix products is spent on finding modules, hooks and attention
functions. Where a layer only infers, and it and its parts are what transformers wrote, without a hook, the same
operations are called one after the other. Everything else takes the modules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .packing import project


class Projected(NamedTuple):
    """Queries, keys and values [B, n, H · d], and what a rider made, if one came along."""

    query: Tensor
    key: Tensor
    value: Tensor
    ridden: Tensor | None


# With more images the products take so long that nothing else counts.
_MOST_IMAGES = 16


def is_lean(layer: Any, x: Tensor, implementation: str | None) -> bool:
    """Whether a layer like ViT's may run its operations one after the other, and gains by it."""
    if layer.training or implementation != "sdpa" or x.device.type != "cpu" or x.shape[0] > _MOST_IMAGES:
        return False
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    own = layer._modules
    attention, mlp = own["attention"], own["mlp"]
    return (
        _is_plain(own["layernorm_before"], nn.LayerNorm)
        and _is_plain(own["layernorm_after"], nn.LayerNorm)
        and _is_plain(attention)
        and _is_plain(attention._modules["o_proj"], nn.Linear)
        and _is_plain(mlp)
        and _is_plain(mlp._modules["fc1"], nn.Linear)
        and _is_plain(mlp._modules["fc2"], nn.Linear)
        and not torch.nn.modules.module._has_any_global_hook()
    )


def _is_plain(module: Any, kind: type | None = None) -> bool:
    """Whether a module is of a kind (None: of transformers' own), and runs without anybody's hook around it."""
    known = module.__class__ is kind if kind is not None else module.__class__.__module__.startswith("transformers.")
    values = vars(module)
    return known and not (values["_forward_hooks"] or values["_forward_pre_hooks"] or "_old_forward" in values)


def norm(module: Any, x: Tensor) -> Tensor:
    """A LayerNorm."""
    own = module._parameters
    return F.layer_norm(x, module.normalized_shape, own["weight"], own["bias"], module.eps)


def linear(module: Any, x: Tensor) -> Tensor:
    """A linear map."""
    own = module._parameters
    return F.linear(x, own["weight"], own["bias"])


def attend(attention: Any, normed: Tensor, bias: Tensor | None, rider: Any) -> tuple[Tensor, Projected] | None:
    """Self-attention with an additive mask: [B, n, D] -> [B, n, D]. None where the projections cannot be packed."""
    own = attention._modules
    linears = [own["q_proj"], own["k_proj"], own["v_proj"]]
    found = project(attention, linears if rider is None else [*linears, rider], normed)
    if found is None:
        return None
    projected = Projected(found[0], found[1], found[2], found[3] if len(found) > 3 else None)
    shape = (*normed.shape[:2], -1, attention.head_dim)
    query, key, value = (x.view(shape).transpose(1, 2) for x in projected[:3])
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=attention.scaling)
    return linear(own["o_proj"], mixed.transpose(1, 2).flatten(2)), projected


def lean_layer(
    layer: Any, x: Tensor, bias: Tensor | None, rider: Any, merge: Callable[[Tensor, Tensor, Projected], Tensor]
) -> Tensor | None:
    """A layer of ViT, with `merge(x, normed, projected)` behind its attention; None where it must take its modules."""
    own = layer._modules
    normed = norm(own["layernorm_before"], x)
    attended = attend(own["attention"], normed, bias, rider)
    if attended is None:
        return None
    x = merge(attended[0].add_(x), normed, attended[1])
    mlp = own["mlp"]._modules
    grown = mlp["activation_fn"](linear(mlp["fc1"], norm(own["layernorm_after"], x)))
    return linear(mlp["fc2"], grown).add_(x)
