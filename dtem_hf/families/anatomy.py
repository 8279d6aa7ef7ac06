"""Names of the parts of a family's layer. The generic forward pass in `layer.py` needs only these."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from ..embedding import KeyProjection
from .shifts import ShiftedLinear


@dataclass(frozen=True)
class Anatomy:
    """Names of the parts of a pre-norm layer, as (dotted) attributes of the layer.

    The layer computes x += branch1(attention(norm1(x))), merges, and computes x += branch2(mlp(norm2(x))). `branch1`
    and `branch2` list, in order, the steps between a part and the residual sum: modules (dropout, layer scale) are
    called, parameters multiply. `query` and `key` are the projections of the normalised input, `heads` the number of
    heads. `packed`: one projection gives queries, keys and values, in this order; `query` and `key` both name it.
    """

    norm1: str
    attention: str
    norm2: str
    mlp: str
    query: str
    key: str
    heads: str
    branch1: tuple[str, ...] = ()
    branch2: tuple[str, ...] = ()
    packed: bool = False

    def key_module(self, layer: nn.Module) -> Any:
        """The module that computes a layer's keys."""
        return attrgetter(self.key)(layer)

    def heads_of(self, layer: nn.Module, hidden_size: int) -> tuple[int, int]:
        """The number of heads and the width of a head, from the key module's declared size or from the hidden size."""
        key, heads = self.key_module(layer), attrgetter(self.heads)(layer)
        width = getattr(key, "out_features", hidden_size * (3 if self.packed else 1))
        return heads, width // (3 * heads if self.packed else heads)

    def key_projection(self, layer: nn.Module, hidden_size: int, like: Tensor) -> KeyProjection:
        """The weights of a layer's map to attention keys; `like` has the device and dtype of the layer's input."""
        weight, bias = affine_map(self.key_module(layer), hidden_size, like)
        if self.packed:
            weight, bias = weight.chunk(3)[1], None if bias is None else bias.chunk(3)[1]
        return KeyProjection(weight, bias, attrgetter(self.heads)(layer))


@torch.no_grad()
def affine_map(module: Any, in_features: int, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """The weight [E, D] and bias [E] of an affine module, in whatever form the module stores them.

    For a plain linear module, these are its tensors. For any other (quantised, offloaded, sharded, with LoRA), they
    are computed from its outputs for zero and for all unit vectors.
    """
    plain = type(module) is nn.Linear or isinstance(module, ShiftedLinear)
    if plain and type(module.weight) is nn.Parameter and not module.weight.is_meta:
        return module.weight, module.bias
    training = module.training
    module.eval()
    try:
        bias = module(like.new_zeros(1, in_features))
        unit_vectors = torch.eye(in_features, dtype=like.dtype, device=like.device)
        return (module(unit_vectors) - bias).T, bias[0]
    finally:
        module.train(training)


def linear_cost(modules: Iterable[Any]) -> int:
    """Multiply-adds of all linear maps among modules, each applied to one token, by their declared sizes."""
    total = 0
    for module in modules:
        inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)
        # A wrapper (LoRA) declares the sizes of the map inside; only that map counts.
        if inputs and outputs and not any(hasattr(child, "in_features") for child in module.children()):
            total += inputs * outputs
    return total


def convolution_cost(modules: Iterable[nn.Module]) -> int:
    """Multiply-adds of all convolutions among modules, each at one output position."""
    return sum(
        m.out_channels * m.in_channels // m.groups * math.prod(m.kernel_size)
        for m in modules
        if isinstance(m, (nn.Conv2d, nn.Conv3d))
    )
