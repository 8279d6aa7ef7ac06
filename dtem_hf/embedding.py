"""The decoupled embedding: one small affine map per layer, by which tokens are compared (METHOD.md section 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .errors import BadValue


class KeyProjection(NamedTuple):
    """A layer's map from its normalised input to attention keys: weight [H·d, D], bias [H·d] or None, H heads."""

    weight: Tensor
    bias: Tensor | None
    num_heads: int

    @property
    def head_dim(self) -> int:
        return self.weight.shape[0] // self.num_heads


class DecoupledEmbedding(nn.Module):
    """The learned embeddings of all layers of an encoder, in one container of their own.

    Parameters `layers.{i}.weight` [d', D] and `layers.{i}.bias` [d'].
    """

    def __init__(self, num_layers: int, hidden_size: int, embed_dim: int, device: torch.device | None = None) -> None:
        super().__init__()
        # False while from_pretrained has nothing to fill it from.
        self.is_filled = True
        self.layers = nn.ModuleList(nn.Linear(hidden_size, embed_dim, device=device) for _ in range(num_layers))

    @property
    def embed_dim(self) -> int:
        return self.layers[0].out_features  # type: ignore[return-value]


def default_embed_dim(hidden_size: int, head_dim: int) -> int:
    """d' = d for models narrower than 1024, 2d for wider ones."""
    return head_dim if hidden_size < 1024 else 2 * head_dim


def mean_key_projection(keys: KeyProjection, embed_dim: int | None = None) -> tuple[Tensor, Tensor]:
    """The mean over heads of W_k and b_k, or over each of as many groups of heads as fill `embed_dim`.

    Returns weight [d', D] and bias [d'].
    Raises ValueError where `embed_dim` is not a multiple of the head's width, at most one per head.
    """
    head_dim, heads = keys.head_dim, keys.num_heads
    groups, rest = divmod(head_dim if embed_dim is None else embed_dim, head_dim)
    if rest or not 1 <= groups <= heads:
        raise BadValue(
            "embed_dim",
            embed_dim,
            f"init='keys' needs a multiple of {head_dim}, from {head_dim} to {head_dim * heads}",
        )
    weight = keys.weight.unflatten(0, (heads, head_dim))  # [H·d, D] -> [H, d, D]
    bias = weight.new_zeros(heads, head_dim) if keys.bias is None else keys.bias.unflatten(0, (heads, head_dim))
    weights = [part.mean(dim=0) for part in weight.tensor_split(groups)]
    biases = [part.mean(dim=0) for part in bias.tensor_split(groups)]
    return torch.cat(weights), torch.cat(biases)


@torch.no_grad()
def initialize_from_keys(embedding: DecoupledEmbedding, keys: Sequence[KeyProjection]) -> None:
    """Make an untrained DTEM equal to ToMe: every layer's embedding becomes its mean key."""
    for layer, projection in zip(embedding.layers, keys, strict=True):
        weight, bias = mean_key_projection(projection, embedding.embed_dim)
        layer.weight.copy_(weight)  # type: ignore[operator]
        layer.bias.copy_(bias)  # type: ignore[operator]


@torch.no_grad()
def initialize_randomly(embedding: DecoupledEmbedding, std: float) -> None:
    """Normal weights with the backbone's own standard deviation, biases of zero."""
    for layer in embedding.layers:
        nn.init.normal_(layer.weight, std=std)  # type: ignore[arg-type]
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
