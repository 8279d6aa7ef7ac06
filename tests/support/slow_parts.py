"""Parts of a layer from its weights alone, as formulas: activations, linear maps and norms."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


Weights = Mapping[str, Tensor]


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def tanh_gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def quick_gelu(x: Tensor) -> Tensor:
    return x / (1 + (-1.702 * x).exp())


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    """A linear map, which may have a bias."""
    mapped = x @ weights[f"{name}.weight"].T
    return mapped + weights[f"{name}.bias"] if f"{name}.bias" in weights else mapped


def layer_norm(weights: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    """Every token minus its mean, by its standard deviation; without a bias, by its root mean square alone."""
    if f"{name}.bias" not in weights:
        return x / ((x**2).mean(dim=-1, keepdim=True) + eps).sqrt() * weights[f"{name}.weight"]
    centred = x - x.mean(dim=-1, keepdim=True)
    variance = (centred**2).mean(dim=-1, keepdim=True)
    return centred / (variance + eps).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def learned_of(weights: Weights, name: str) -> Tensor | None:
    """What an encoder has learned under a name, wherever the encoder is in the model."""
    return next((value for key, value in weights.items() if key.endswith(name)), None)
