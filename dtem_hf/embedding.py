"""The decoupled embedding: one small affine map per layer, by which tokens are compared (METHOD.md section 2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from . import ops
from .errors import BadValue, need


@dataclass(frozen=True)
class Geometry:
    """The widths and counts of an encoder that merging goes by; H = `num_heads`, d = `head_dim`, D = `hidden_size`.

    `shiftable`: names and lengths of the encoder's parameters that `DTEMConfig.learn_shifts` moves.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    head_dim: int
    num_prefix_tokens: int
    shiftable: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class KeyProjection:
    """A layer's map from its normalised input to attention keys: weight [H·d, D], bias [H·d] or None, H heads."""

    weight: Tensor
    bias: Tensor | None
    num_heads: int

    @property
    def head_dim(self) -> int:
        return self.weight.shape[0] // self.num_heads


_SMALLEST_NORM = 1e-12


@dataclass(frozen=True)
class EmbeddingShape:
    """What is learned of an encoder: its layers, its width D, the width d' of the embedding, and options.

    `exponent_heads`: the number of heads that have an exponent of token sizes, 0 for none. `norms`: whether each layer
    has a share of the length that a mean of tokens loses and gets back. `predictors`: the number of networks that
    score tokens, which dTPS has in the place of an embedding (`embed_dim` 0). `shifts`: names and lengths of the
    backbone's parameters that move while tokens are merged.
    """

    num_layers: int
    hidden_size: int
    embed_dim: int
    exponent_heads: int = 0
    norms: bool = False
    predictors: int = 0
    shifts: tuple[tuple[str, int], ...] = ()

    def tensors(self) -> dict[str, list[int]]:
        """Shapes by the names that tensors have in an adapter."""
        shapes = {}
        for i in range(self.predictors):
            shapes[f"predictors.{i}.norm.weight"] = shapes[f"predictors.{i}.norm.bias"] = [self.hidden_size]
            for name, (inner, outer) in predictor_widths(self.hidden_size).items():
                shapes[f"predictors.{i}.{name}.weight"] = [outer, inner]
                shapes[f"predictors.{i}.{name}.bias"] = [outer]
        for i in range(self.num_layers if self.embed_dim else 0):
            shapes[f"layers.{i}.weight"] = [self.embed_dim, self.hidden_size]
            shapes[f"layers.{i}.bias"] = [self.embed_dim]
            if self.exponent_heads:
                shapes[f"exponents.{i}"] = [self.exponent_heads]
            if self.norms:
                shapes[f"norms.{i}"] = [1]
        return shapes | {f"shifts.{name}": [length] for name, length in self.shifts}


class Projection(nn.Module):
    """A learned affine map: [..., D] -> [..., d'].

    No `nn.Linear`, which quantisers and PEFT's "all-linear" would change along with the backbone's.
    """

    def __init__(self, in_features: int, out_features: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device))
        self.bias = nn.Parameter(torch.empty(out_features, device=device))

    def forward(self, x: Tensor) -> Tensor:
        # A quantised backbone may compute in another dtype.
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


def predictor_widths(width: int) -> dict[str, tuple[int, int]]:
    """Widths in and out of the linear maps of a `Predictor`, by name (METHOD.md section 9)."""
    half, quarter = width // 2, width // 4
    return {"embed": (width, width), "fc1": (width, half), "fc2": (half, quarter), "fc3": (quarter, 2)}


class Predictor(nn.Module):
    """dTPS's network: from tokens and their weighted mean, whether to keep or to prune each."""

    def __init__(self, width: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, device=device)
        widths = predictor_widths(width).values()
        self.embed, self.fc1, self.fc2, self.fc3 = (Projection(*pair, device) for pair in widths)

    def forward(self, x: Tensor, counted: Tensor) -> Tensor:
        """Logarithms of the probabilities to keep and to prune: x [B, n, D], `counted` [B, n] -> [B, n, 2].

        In float32 at least. Tokens that are `counted` 0 are not in the mean.
        """
        u = F.gelu(self.embed(self.norm(x.to(self.norm.weight.dtype))))
        local, shared = u.split([u.shape[-1] - u.shape[-1] // 2, u.shape[-1] // 2], dim=-1)
        wide = torch.promote_types(u.dtype, torch.float32)
        weights = counted.unsqueeze(-1).to(wide)
        total = weights.sum(dim=1, keepdim=True).clamp(min=_SMALLEST_NORM)
        mean = ((shared.to(wide) * weights).sum(dim=1, keepdim=True) / total).to(u.dtype)
        u = torch.cat([local, mean.expand_as(shared)], dim=-1)
        return F.log_softmax(self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(u))))).to(wide), dim=-1)


class LearnedVector(nn.Module):
    """A learned vector [n]; read by calling the module, so that offloading and sharding bring it in."""

    def __init__(self, length: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.empty(length, device=device))

    def forward(self) -> Tensor:
        return self.value


class Shifts(nn.Module):
    """What is added to parameters of the backbone, times the share of the tokens that are gone.

    Read by calling the module, which gives all of them by name.
    """

    def __init__(self, lengths: Sequence[tuple[str, int]], device: torch.device | None = None) -> None:
        super().__init__()
        for name, length in lengths:
            self.register_parameter(self.key(*name.split(".")), nn.Parameter(torch.empty(length, device=device)))

    def forward(self) -> dict[str, Tensor]:
        return {name: value for name, value in self._parameters.items() if value is not None}

    @staticmethod
    def key(*name: str) -> str:
        """The key of a parameter in what the module returns, from the parts of its name.

        A module allows no dots, and transformers renames keys that look like a backbone's own when it loads some
        checkpoints; its patterns are of small letters.
        """
        return "-".join(name).upper()


class DecoupledEmbedding(nn.Module):
    """The learned parameters of an encoder: `projections`, and `exponents`, `norms`, `shifts` and `predictors`.

    Made without values (nothing is drawn): a method or an adapter fills it.
    """

    def __init__(self, shape: EmbeddingShape, device: torch.device | None = None) -> None:
        super().__init__()
        self.shape = shape
        depth = range(shape.num_layers)
        self.projections = nn.ModuleList(
            Projection(shape.hidden_size, shape.embed_dim, device) for _ in depth if shape.embed_dim
        )
        self.predictors = nn.ModuleList(Predictor(shape.hidden_size, device) for _ in range(shape.predictors))
        self.exponents = nn.ModuleList(
            LearnedVector(shape.exponent_heads, device) for _ in depth if shape.exponent_heads
        )
        self.norms = nn.ModuleList(LearnedVector(1, device) for _ in depth if shape.norms)
        self.shifts = Shifts(shape.shifts, device)

    def exponents_of(self, layer: int) -> Tensor | None:
        """The powers to which sizes are raised in a layer's attention, one per head [H]; None where they are 1."""
        return self.exponents[layer]() if self.exponents else None

    def lengthen(self, layer: int, x: Tensor, norms: Callable[[], Tensor]) -> Tensor:
        """Give means of tokens a learned share of the length that they lost: x [B, n, D] -> [B, n, D].

        `norms` makes the size-weighted mean length of the tokens that each x is the mean of, [B, n, 1]. Single tokens
        stay as they are, and all do where nothing is learned.
        """
        if not self.norms:
            return x
        lost = norms().clamp(min=_SMALLEST_NORM) / ops.norms_of(x).clamp(min=_SMALLEST_NORM)
        return (x * lost.pow(self.norms[layer]().to(x.device, torch.float32))).to(x.dtype)

    def zero(self) -> Tensor | None:
        """A zero that depends on every parameter that learns: added to an output, it gives each a gradient, if only 0.

        None where nothing learns. DistributedDataParallel waits for the gradients of all parameters.
        """
        learning = [p for p in self.parameters() if p.requires_grad and not isinstance(p, DTensor)]
        return 0 * torch.stack([p.sum(dtype=torch.float32) for p in learning]).sum() if learning else None

    def aggregation_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that say how merged tokens count."""
        yield from self.exponents.parameters()
        yield from self.norms.parameters()

    @torch.no_grad()
    def reset_aggregation(self) -> None:
        """Set exponents to 1, shares of lost length and shifts to 0, which is plain merging."""
        for parameter in self.exponents.parameters():
            parameter.fill_(1)
        for parameter in (*self.norms.parameters(), *self.shifts.parameters()):
            parameter.zero_()

    def adapter_tensors(self) -> dict[str, Tensor]:
        """The parameters by the names that `EmbeddingShape.tensors` gives them; not copied."""
        return {name: self.get_parameter(_module_name(name)) for name in self.shape.tensors()}

    @torch.no_grad()
    def adapter_values(self) -> dict[str, Tensor]:
        """Copies of the parameters in float32 on the CPU, by the same names; offloaded and sharded ones, too."""
        values = {}
        for name in self.shape.tensors():
            module_name, _, parameter_name = _module_name(name).rpartition(".")
            module = self.get_submodule(module_name)
            with _parameters_in_reach(module):
                value: Tensor = module.get_parameter(parameter_name)
                value = value.full_tensor() if isinstance(value, DTensor) else value
                values[name] = value.detach().to("cpu", torch.float32, copy=True)
        return values

    @torch.no_grad()
    def load_adapter_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors with an adapter's names into the parameters. Raises KeyError for one that is missing."""
        for name, parameter in self.adapter_tensors().items():
            parameter.copy_(tensors[name])


def _parameters_in_reach(module: nn.Module) -> AbstractContextManager[Any]:
    """Accelerate keeps the parameters of an offloaded module elsewhere; without it, no module has its hook."""
    if not hasattr(module, "_hf_hook"):
        return nullcontext()
    need("train", "an offloaded model", "accelerate")
    from accelerate.utils import align_module_device

    context: AbstractContextManager[Any] = align_module_device(module)
    return context


def _module_name(adapter_name: str) -> str:
    """The name in the module of a tensor of an adapter.

    The module has no child called `layers`: transformers renames keys with that word when it loads some checkpoints.
    """
    kind, rest = adapter_name.split(".", 1)
    if kind == "layers":
        return f"projections.{rest}"
    if kind == "shifts":
        return f"shifts.{Shifts.key(*rest.split('.'))}"
    return adapter_name if kind == "predictors" else f"{adapter_name}.value"


def default_embed_dim(geometry: Geometry) -> int:
    """d' = d for models narrower than 1024, 2d for wider ones."""
    return geometry.head_dim if geometry.hidden_size < 1024 else 2 * geometry.head_dim


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
    for layer, projection in zip(embedding.projections, keys, strict=True):
        weight, bias = mean_key_projection(projection, embedding.shape.embed_dim)
        layer.weight.copy_(weight)  # type: ignore[operator]
        layer.bias.copy_(bias)  # type: ignore[operator]
    embedding.reset_aggregation()


@torch.no_grad()
def initialize_randomly(embedding: DecoupledEmbedding, std: float, seed: int | None = None) -> None:
    """Normal weights of the given standard deviation, biases of zero; with a seed, always the same."""
    draw = None
    if seed is not None:
        draw = torch.Generator(next(embedding.parameters()).device).manual_seed(seed)
    for layer in embedding.modules():
        if isinstance(layer, Projection):
            nn.init.normal_(layer.weight, std=std, generator=draw)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.LayerNorm):
            layer.reset_parameters()
    embedding.reset_aggregation()
