"""The decoupled embedding: one small affine map per layer, by which tokens are compared (METHOD.md section 2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .errors import BadValue


@dataclass(frozen=True)
class KeyProjection:
    """A layer's map from its normalised input to attention keys: weight [H·d, D], bias [H·d] or None, H heads."""

    weight: Tensor
    bias: Tensor | None
    num_heads: int

    @property
    def head_dim(self) -> int:  # of a NamedTuple, Dynamo of torch 2.9 could not read it
        return self.weight.shape[0] // self.num_heads


_SMALLEST_NORM = 1e-12


def norms_of(x: Tensor) -> Tensor:
    """Lengths of tokens in float32: [B, n, D] -> [B, n, 1]."""
    # Added up in float32 at least; a float64 model's may not be narrowed on the way.
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype).float()


@dataclass(frozen=True)
class EmbeddingShape:
    """What is learned of an encoder: its layers, its width D, the width d' of the embedding, and what there is beside.

    `exponent_heads`: exponents of token sizes for so many heads, 0 for none; `norms`: how much of the length that a
    mean loses is given back.
    """

    num_layers: int
    hidden_size: int
    embed_dim: int
    exponent_heads: int = 0
    norms: bool = False

    def tensors(self) -> dict[str, list[int]]:
        """Shapes by the names that tensors have in an adapter."""
        shapes = {}
        for i in range(self.num_layers):
            shapes[f"layers.{i}.weight"] = [self.embed_dim, self.hidden_size]
            shapes[f"layers.{i}.bias"] = [self.embed_dim]
            if self.exponent_heads:
                shapes[f"exponents.{i}"] = [self.exponent_heads]
            if self.norms:
                shapes[f"norms.{i}"] = [1]
        return shapes


class DecoupledEmbedding(nn.Module):
    """What is learned of all layers of an encoder, in one container of its own.

    Parameters `layers.{i}.weight` [d', D] and `layers.{i}.bias` [d']; where sizes have learned exponents,
    `exponents.{i}` [H]; where means are lengthened, `norms.{i}` [1].
    """

    def __init__(self, shape: EmbeddingShape, device: torch.device | None = None) -> None:
        super().__init__()
        # False while from_pretrained has nothing to fill it from.
        self.is_filled = True
        self.shape = shape
        depth, width = shape.num_layers, shape.hidden_size
        self.layers = nn.ModuleList(nn.Linear(width, shape.embed_dim, device=device) for _ in range(depth))
        self.exponents: nn.ParameterList | None = None
        if shape.exponent_heads:
            ones = (torch.ones(shape.exponent_heads, device=device) for _ in range(depth))
            self.exponents = nn.ParameterList(nn.Parameter(one) for one in ones)
        self.norms: nn.ParameterList | None = None
        if shape.norms:
            self.norms = nn.ParameterList(nn.Parameter(torch.zeros(1, device=device)) for _ in range(depth))

    @property
    def embed_dim(self) -> int:
        return self.shape.embed_dim

    def exponents_of(self, layer: int) -> Tensor | None:
        """The powers to which sizes are raised in a layer's attention, one per head [H]; None where they are 1."""
        return None if self.exponents is None else self.exponents[layer]

    def norm_power_of(self, layer: int) -> Tensor | None:
        """The learned share of their length that means are given back [1]; None where it is none."""
        return None if self.norms is None else self.norms[layer]

    def lengthen(self, layer: int, x: Tensor, norms: Callable[[], Tensor]) -> Tensor:
        """Give means of tokens back what they lost of their length, to a learned share: x [B, n, D] -> [B, n, D].

        `norms` makes the mean lengths of the tokens that each is the mean of, [B, n, 1]. Where it is one token, and
        where nothing is learned, x stays.
        """
        if self.norms is None:
            return x
        lost = norms().clamp(min=_SMALLEST_NORM) / norms_of(x).clamp(min=_SMALLEST_NORM)
        return (x * lost.pow(self.norms[layer].to(x.device, torch.float32))).to(x.dtype)

    def aggregation_parameters(self) -> Iterator[nn.Parameter]:
        """What says how merged tokens count; all others say how tokens compare."""
        for module in (self.exponents, self.norms):
            if module is not None:
                yield from module.parameters()

    @torch.no_grad()
    def reset_aggregation(self) -> None:
        """Let sizes count as they are in attention, and means be as long as they are."""
        for parameter in self.aggregation_parameters():
            parameter.zero_()
        for parameter in () if self.exponents is None else self.exponents:
            parameter.fill_(1)


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
    embedding.reset_aggregation()


@torch.no_grad()
def initialize_randomly(embedding: DecoupledEmbedding, std: float) -> None:
    """Normal weights with the backbone's own standard deviation, biases of zero."""
    for layer in embedding.layers:
        nn.init.normal_(layer.weight, std=std)  # type: ignore[arg-type]
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    embedding.reset_aggregation()
