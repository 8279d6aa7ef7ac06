"""Peers for recipes/benchmark.py: what fewer tokens, and other matrix products, save on a machine by themselves.

python recipes/benchmark.py --model recipes/configs/deit_small --random_weights True --r 16 --peer recipes.peers:sliced
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from dtem_hf.ops import products


def sliced(model: Any, r: int) -> Callable[[Tensor], Tensor]:
    """A ViT that drops its last r tokens (half of them, where there are fewer) behind every attention, for nothing.

    No metric, no matching, no merging, no sizes, and the same operations otherwise, called one after the other.
    """
    _check_activation(model)
    return lambda pixels: _forward(model, pixels, r, _module)


def sliced_by_onednn(model: Any, r: int) -> Callable[[Tensor], Tensor]:
    """The same, and in every layer the products that a merged model takes behind its first merge.

    Raises RuntimeError on a machine where none does.
    """
    _check(model)
    return lambda pixels: _forward(model, pixels, r, _product)


def plain_by_onednn(model: Any, r: int) -> Callable[[Tensor], Tensor]:
    """The plain ViT with these products: nothing is dropped, whatever r. Raises RuntimeError on a machine without."""
    _check(model)
    return lambda pixels: _forward(model, pixels, 0, _product)


def _check(model: Any) -> None:
    _check_activation(model)
    if not products.is_available():
        raise RuntimeError("merged models take no products by oneDNN on this machine: leave this peer out")


def _check_activation(model: Any) -> None:
    if model.config.hidden_act != "gelu":
        raise RuntimeError(f"hidden_act={model.config.hidden_act!r}: these peers are written for 'gelu'")


def _product(linear: Any, x: Tensor, gelu: str | None = None) -> Tensor:
    if products.can_multiply(x) and products.is_faster(x, linear.weight):
        return products.multiply(x, linear.weight, linear.bias, gelu)
    return _module(linear, x, gelu)


def _module(linear: Any, x: Tensor, gelu: str | None = None) -> Tensor:
    return linear(x) if gelu is None else F.gelu(linear(x), approximate=gelu)


def _forward(model: Any, pixels: Tensor, r: int, linear: Callable[..., Tensor]) -> Tensor:
    vit = model.vit
    x = vit.embeddings(pixels)
    for layer in vit.layers:
        attention, mlp, normed = layer.attention, layer.mlp, layer.layernorm_before(x)
        shape = (*x.shape[:2], -1, attention.head_dim)
        query, key, value = (
            linear(projection, normed).view(shape).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = x + linear(attention.o_proj, mixed)
        x = x[:, : x.shape[1] - min(r, (x.shape[1] - 1) // 2)]
        x = x + linear(mlp.fc2, linear(mlp.fc1, layer.layernorm_after(x), "none"))
    return model.classifier(vit.layernorm(x)[:, 0])
