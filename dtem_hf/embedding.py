"""The decoupled embedding: an affine map per layer gives the features to compare (docs/method.md section 2)."""

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
    """Widths and counts of an encoder; H = `num_heads`, d = `head_dim`, D = `hidden_size`.

    `shiftable`: names and lengths of the encoder's parameters that `DTEMConfig.learn_shifts` shifts.
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
    """The shapes of the learned parameters: number of layers, hidden width D, embedding width d', and options.

    `exponent_heads`: the number of heads with an exponent of token sizes, 0 for none. `norms`: each layer learns what
    share of its lost length a merged token gets back. `predictors`: the number of networks that score tokens; dTPS has
    them and no embedding (`embed_dim` 0). `shifts`: names and lengths of the backbone's parameters that are shifted.
    """

    num_layers: int
    hidden_size: int
    embed_dim: int
    exponent_heads: int = 0
    norms: bool = False
    predictors: int = 0
    shifts: tuple[tuple[str, int], ...] = ()

    def tensors(self) -> dict[str, list[int]]:
        """Shapes by the tensors' names in an adapter."""
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

    It is no `nn.Linear`: quantisers and PEFT's "all-linear" would change that along with the backbone's.
    """

    def __init__(self, in_features: int, out_features: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device))
        self.bias = nn.Parameter(torch.empty(out_features, device=device))

    def forward(self, x: Tensor) -> Tensor:
        # A quantised backbone may compute in another dtype.
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


def predictor_widths(width: int) -> dict[str, tuple[int, int]]:
    """Widths in and out of the linear maps of a `Predictor`, by name (docs/method.md section 9)."""
    half, quarter = width // 2, width // 4
    return {"embed": (width, width), "fc1": (width, half), "fc2": (half, quarter), "fc3": (quarter, 2)}


class Predictor(nn.Module):
    """dTPS's network: it scores from each token and the mean of all kept tokens whether to keep the token."""

    def __init__(self, width: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, device=device)
        widths = predictor_widths(width).values()
        self.embed, self.fc1, self.fc2, self.fc3 = (Projection(*pair, device) for pair in widths)

    def forward(self, x: Tensor, counted: Tensor) -> Tensor:
        """Log-probabilities to keep and to prune each token: x [B, n, D], `counted` [B, n] -> [B, n, 2].

        The result is float32 or wider. `counted` holds the tokens' weights in the mean; 0 leaves a token out.
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
    """A learned vector [n]. Call the module to read it: offloading and sharding load the values at a call."""

    def __init__(self, length: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.empty(length, device=device))

    def forward(self) -> Tensor:
        return self.value


class Shifts(nn.Module):
    """Learned shifts of backbone parameters. A pass adds them, times the share of the tokens merged so far.

    Call the module to read them, by name.
    """

    def __init__(self, lengths: Sequence[tuple[str, int]], device: torch.device | None = None) -> None:
        super().__init__()
        for name, length in lengths:
            self.register_parameter(self.key(*name.split(".")), nn.Parameter(torch.empty(length, device=device)))

    def forward(self) -> dict[str, Tensor]:
        return {name: value for name, value in self._parameters.items() if value is not None}

    @staticmethod
    def key(*name: str) -> str:
        """The key of a parameter in the module's output, made from the parts of the parameter's name.

        Module names must not contain dots. The key is in capitals because transformers, when it loads some
        checkpoints, renames keys that match patterns in small letters.
        """
        return "-".join(name).upper()


class DecoupledEmbedding(nn.Module):
    """The learned parameters of an encoder: `projections`, `exponents` and `norms` by layer, `shifts`, `predictors`.

    A layer's exponents of token sizes are one per head, [H].
    The constructor leaves the values uninitialised; a method or an adapter fills them.
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

    def lengthen(self, layer: int, x: Tensor, norms: Callable[[], Tensor]) -> Tensor:
        """Give merged tokens back a learned share of their lost length: x [B, n, D] -> [B, n, D].

        `norms` returns, for each merged token, the size-weighted mean length of the tokens that were merged into it,
        [B, n, 1]. Unmerged tokens do not change. Without learned shares, x is returned.
        """
        if not self.norms:
            return x
        lost = norms().clamp(min=_SMALLEST_NORM) / ops.norms_of(x).clamp(min=_SMALLEST_NORM)
        return (x * lost.pow(self.norms[layer]().to(x.device, torch.float32))).to(x.dtype)

    def zero(self) -> Tensor | None:
        """A zero that depends on every trainable parameter; None if there is none.

        Added to an output, it gives each parameter a gradient, if only 0. DistributedDataParallel waits for a gradient
        of every parameter.
        """
        learning = [p for p in self.parameters() if p.requires_grad and not isinstance(p, DTensor)]
        return 0 * torch.stack([p.sum(dtype=torch.float32) for p in learning]).sum() if learning else None

    def aggregation_parameters(self) -> Iterator[nn.Parameter]:
        """The exponents of token sizes and the shares of lost length."""
        yield from self.exponents.parameters()
        yield from self.norms.parameters()

    @torch.no_grad()
    def reset_aggregation(self) -> None:
        """Make merging plain: set exponents to 1, and shares of lost length and shifts to 0."""
        for parameter in self.exponents.parameters():
            parameter.fill_(1)
        for parameter in (*self.norms.parameters(), *self.shifts.parameters()):
            parameter.zero_()

    def adapter_tensors(self) -> dict[str, Tensor]:
        """The parameters themselves, by their names in an adapter (`EmbeddingShape.tensors`)."""
        return {name: self.get_parameter(_module_name(name)) for name in self.shape.tensors()}

    @torch.no_grad()
    def adapter_values(self) -> dict[str, Tensor]:
        """Copies of all parameters, offloaded and sharded ones too, in float32 on the CPU, by their adapter names."""
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
        """Copy an adapter's tensors into the parameters. Raises KeyError for a missing tensor."""
        for name, parameter in self.adapter_tensors().items():
            parameter.copy_(tensors[name])


def _parameters_in_reach(module: nn.Module) -> AbstractContextManager[Any]:
    """Inside the block, an offloaded module has its parameters; Accelerate keeps them elsewhere."""
    if not hasattr(module, "_hf_hook"):
        return nullcontext()
    need("train", "an offloaded model", "accelerate")
    from accelerate.utils import align_module_device

    context: AbstractContextManager[Any] = align_module_device(module)
    return context


def _module_name(adapter_name: str) -> str:
    """The module's name for an adapter's tensor.

    The module has no child `layers`: transformers renames keys with that word when it loads some checkpoints.
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
    """The mean over heads of W_k and b_k; for an `embed_dim` of g head widths, the means of g groups of heads.

    Returns weight [d', D] and bias [d'].
    Raises ValueError if `embed_dim` is not a multiple of the head width, or is larger than all heads together.
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
    """Draw normal weights of the given standard deviation and set biases to zero; a seed fixes the draw."""
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
