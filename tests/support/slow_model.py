"""A merged vision transformer from its weights alone: METHOD.md section 1, one image at a time, token by token.

Nothing here calls the package or the layers of transformers: an `Anatomy` says what a family's layers are like and
where its state dict keeps what they need, `run` runs them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tests.support import slow_reference as slow


Weights = Mapping[str, Tensor]
Inputs = Mapping[str, Tensor]
Outputs = dict[str, Tensor]
Step = Callable[[Tensor, Tensor, Tensor, Tensor, int, int], slow.Joined]


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def tanh_gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def quick_gelu(x: Tensor) -> Tensor:
    return x / (1 + (-1.702 * x).exp())


@dataclass(frozen=True)
class Anatomy:
    """A family. `embed` makes the first tokens [N, D] of one image, `head` outputs of the last ones and their sizes.

    `layer` is what the weights of a layer begin with, its number in braces; the other names come behind it. `qkv` are
    three linear maps or one. `gate` is a linear map whose activation multiplies what the first one of `mlp` gives.
    `tables` are those of relative position biases, with their whole names. `theta` is the
    base of rotary positions. Where it or a table is given, `places` says where the patches of an image lie [N - P, 2].
    `turn` rotates keys and queries by places in another way than DINOv3's. With `whole`, `head` gets the token of
    every patch, in its place. `reader` takes the place of `head` where sizes alone do not say which tokens it reads.
    `residual` multiplies what attention and MLP add, where `scales` are not given.
    """

    embed: Callable[[Weights, Inputs], Tensor]
    head: Callable[[Weights, Tensor, Tensor], Outputs] | None
    prefix: int
    layer: str
    norms: tuple[str, str]
    qkv: tuple[str, ...]
    out: str
    mlp: tuple[str, str] = ("mlp.fc1", "mlp.fc2")
    gate: str | None = None
    activation: Callable[[Tensor], Tensor] = gelu
    eps: float = 1e-12
    heads: int = 4
    scales: tuple[str, str] | None = None
    residual: float = 1.0
    tables: tuple[str, ...] = ()
    theta: float | None = None
    places: Callable[[Inputs], Tensor] | None = None
    turn: Callable[[Tensor, Tensor, Anatomy], Tensor] | None = None
    whole: bool = False
    reader: Callable[[Weights, Tokens], Outputs] | None = None


@dataclass(frozen=True)
class Reduction:
    """What the layers of a method do; one entry per layer of `r` (tokens fewer), `keep_rates` (None: all) or `steps`.

    A step gets tokens, sizes, metric, attention of the CLS token, the number of prefix tokens and that of the patches
    that entered the first layer; None: all stay. `between`: the step is behind the layer's MLP, and gets the scores of
    its predictor in the place of that attention. `noise` is Gumbel noise [N - P, 2] for one image, by the layer behind
    which dTPS draws in training with it which patches are kept.
    """

    steps: list[Step | None] = field(default_factory=list)
    r: list[int] = field(default_factory=list)
    keep_rates: list[float | None] = field(default_factory=list)
    between: bool = False
    soft: bool = False
    proportional: bool = True
    relaxation: Mapping[str, Any] = field(default_factory=dict)
    noise: Mapping[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Tokens:
    """The tokens of one image: features [n, D], sizes [n], and where the tokens lie [n, 2], if they lie anywhere.

    `members` are the tokens of the first layer that each stands for; `active` of them still take part. `kept` are 1 or
    0 with a gradient [n], where pruned tokens stay.
    """

    x: Tensor
    sizes: Tensor
    places: Tensor | None
    members: list[list[int]]
    active: int
    kept: Tensor | None = None


def run(weights: Weights, anatomy: Anatomy, inputs: Inputs, reduction: Reduction) -> tuple[Outputs, list[Tokens]]:
    """Outputs for one image, and the tokens behind every layer."""
    x = anatomy.embed(weights, inputs)
    sizes = torch.ones(len(x), dtype=x.dtype)
    for name in ("pixel_attention_mask", "patch_attention_mask"):
        sizes = inputs[name].flatten().to(x.dtype) if name in inputs else sizes
    places = None
    if anatomy.places is not None:
        patches = anatomy.places(inputs).to(x.dtype)
        places = torch.cat([patches.new_zeros(anatomy.prefix, patches.shape[1]), patches])
    start = Tokens(x, sizes, places, [[i] for i in range(len(x))], len(x))
    trail = [start]
    for index in range(len(reduction.r or reduction.keep_rates or reduction.steps)):
        trail.append(run_layer(weights, anatomy, index, trail[-1], start, reduction))
    if anatomy.whole:
        return anatomy.head(weights, in_place(trail[-1]), sizes), trail[1:]
    if anatomy.reader is not None:
        return anatomy.reader(weights, trail[-1]), trail[1:]
    outputs = anatomy.head(weights, trail[-1].x, trail[-1].sizes)
    if "last_hidden_state" in outputs:  # a soft merge keeps what it merges away, at the end
        outputs["last_hidden_state"] = outputs["last_hidden_state"][: trail[-1].active]
    if "features" in outputs:  # of the patches alone
        outputs["features"] = outputs["features"][: trail[-1].active - anatomy.prefix]
    return outputs, trail[1:]


def in_place(tokens: Tokens) -> Tensor:
    """For every token of the first layer, the token that stands for it: [N, D]."""
    place = {member: i for i, members in enumerate(tokens.members) for member in members}
    return tokens.x[[place[i] for i in range(len(place))]]


def run_layer(
    weights: Weights, anatomy: Anatomy, index: int, tokens: Tokens, start: Tokens, reduction: Reduction
) -> Tokens:
    """One layer: attention, the reduction, the MLP."""
    root = anatomy.layer.format(index)
    attend_scale = mlp_scale = anatomy.residual
    if anatomy.scales:
        attend_scale, mlp_scale = (weights[root + name] for name in anatomy.scales)
    h = layer_norm(weights, root + anatomy.norms[0], tokens.x, anatomy.eps)
    if len(anatomy.qkv) == 1:
        q, k, v = linear(weights, root + anatomy.qkv[0], h).chunk(3, dim=1)
    else:
        q, k, v = (linear(weights, root + name, h) for name in anatomy.qkv)
    # Padding (of size 0) is never attended to, whatever sizes count for.
    counted = tokens.sizes if reduction.proportional or reduction.soft else (tokens.sizes > 0).to(h.dtype)
    if tokens.kept is not None:
        counted = each_seeing_itself(tokens.sizes if reduction.proportional else tokens.kept)
    exponents = learned_of(weights, f"merge_embedding.exponents.{index}")
    if exponents is not None:
        counted = slow.powers(counted, exponents)
    bias = None
    if anatomy.tables:
        tables = [weights[name.format(index)] for name in anatomy.tables]
        bias = sum(relative_bias(table, tokens.places, start.places, anatomy.prefix) for table in tables)
    turn = anatomy.turn or (rotate if anatomy.theta else None)
    turned = [part if turn is None else turn(part, tokens.places, anatomy) for part in (q, k)]
    scaling = (q.shape[1] // anatomy.heads) ** -0.5
    shares = slow.attention_weights(*turned, anatomy.heads, scaling, counted, bias)
    x = tokens.x + attend_scale * linear(weights, root + anatomy.out, slow.mix(shares, v))

    matrix = learned_of(weights, f"merge_embedding.layers.{index}.weight")
    if matrix is None:
        metric = sum(k.chunk(anatomy.heads, dim=1)) / anatomy.heads
    else:
        metric = h.detach() @ matrix.T + learned_of(weights, f"merge_embedding.layers.{index}.bias")
    share = learned_of(weights, f"merge_embedding.norms.{index}")
    # The lengths of tokens are merged beside them, as one more feature.
    carried = x if share is None else torch.cat([x, x.norm(dim=1, keepdim=True)], dim=1)
    attended, merged = shares[:, 0].mean(dim=0), replace(tokens, x=x)
    if not reduction.between:
        merged = reduce(carried, tokens, start, index, metric, attended, anatomy.prefix, reduction)
    if share is not None:
        merged = replace(merged, x=slow.lengthen(merged.x[:, :-1], merged.x[:, -1], share))

    h = layer_norm(weights, root + anatomy.norms[1], merged.x, anatomy.eps)
    grown = anatomy.activation(linear(weights, root + (anatomy.gate or anatomy.mlp[0]), h))
    if anatomy.gate is not None:
        grown = grown * linear(weights, root + anatomy.mlp[0], h)
    grown = linear(weights, root + anatomy.mlp[1], grown)
    merged = replace(merged, x=merged.x + mlp_scale * grown)
    if index in reduction.noise:
        return draw(weights, merged, start, index, anatomy.prefix, reduction.noise)
    if not reduction.between or reduction.steps[index] is None:
        return merged
    stage = sum(step is not None for step in reduction.steps[:index])
    counted = (merged.sizes > 0).to(h.dtype)
    scores = predict(weights, f"merge_embedding.predictors.{stage}.", merged.x, counted, anatomy.prefix)[:, 0]
    return reduce(merged.x, merged, start, index, metric, scores, anatomy.prefix, reduction)


def each_seeing_itself(counted: Tensor) -> Tensor:
    """How often a token counts for each query: as `counted` [N], and for itself once at least: [1, N, N]."""
    rows = []
    for i in range(len(counted)):
        own = counted.detach()[i].clamp(min=1)
        rows.append(torch.stack([own if j == i else counted[j] for j in range(len(counted))]))
    return torch.stack(rows).unsqueeze(0)


def draw(
    weights: Weights, tokens: Tokens, start: Tokens, index: int, prefix: int, noise: Mapping[int, Tensor]
) -> Tokens:
    """Section 9, dTPS in training: no token leaves, those that are drawn to be pruned now join their hosts."""
    x, before = tokens.x, (start.sizes > 0).to(tokens.x.dtype) if tokens.kept is None else tokens.kept
    stage = sum(layer < index for layer in noise)
    both = predict(weights, f"merge_embedding.predictors.{stage}.", x, before, prefix)
    kept = list(before[:prefix])
    for i in range(prefix, len(x)):
        keep, drop = ((both[i] + noise[index][i - prefix]) / 1.0).exp()
        soft = keep / (keep + drop)
        kept.append(before[i] * ((1.0 if keep > drop else 0.0) + soft - soft.detach()))
    hosts = [j for j in range(prefix, len(x)) if kept[j] > 0.5]
    pruned = [i for i in range(prefix, len(x)) if before[i] > 0.5 and i not in hosts]
    host = {i: max(hosts, key=lambda j: slow.cosine(x[i], x[j]).item()) for i in pruned}
    rows, sizes, members = list(x), list(tokens.sizes.detach()), [list(own) for own in tokens.members]
    for j in hosts:
        joining = [i for i in pruned if host[i] == j]
        shares = [slow.cosine(x[i], x[j]).exp() for i in joining]
        total = math.e * x[j] + sum(share * x[i] for share, i in zip(shares, joining, strict=True))
        rows[j] = total / (math.e + sum(shares))
        sizes[j] = sizes[j] + sum(tokens.sizes[i].detach() for i in joining)
        members[j] = sorted([*members[j], *(member for i in joining for member in tokens.members[i])])
    for i in pruned:
        members[i] = []
    places = tokens.places
    if places is not None:
        places = torch.stack(
            [start.places[own].mean(dim=0) if own else place for own, place in zip(members, places, strict=True)]
        )
    kept = torch.stack(kept)
    return Tokens(torch.stack(rows), torch.stack(sizes) * kept, places, members, len(x), kept)


def predict(weights: Weights, name: str, x: Tensor, counted: Tensor, prefix: int) -> Tensor:
    """Section 9, dTPS: log-probabilities that a predictor keeps and prunes each token [N, 2].

    It sees patches alone, each as often as it is counted [N].
    """
    learned = {key[key.index(name) + len(name) :]: value for key, value in weights.items() if name in key}
    u = [gelu(linear(learned, "embed", layer_norm(learned, "norm", token, 1e-5))) for token in x]
    half = x.shape[1] // 2
    shared = sum(counted[i] * u[i][half:] for i in range(prefix, len(x))) / counted[prefix:].sum()
    scores = []
    for token in u:
        hidden = gelu(linear(learned, "fc1", torch.cat([token[:half], shared])))
        both = linear(learned, "fc3", gelu(linear(learned, "fc2", hidden)))
        scores.append(both - both.exp().sum().log())
    return torch.stack(scores)


def reduce(
    x: Tensor,
    tokens: Tokens,
    start: Tokens,
    index: int,
    metric: Tensor,
    attended: Tensor,
    prefix: int,
    reduction: Reduction,
) -> Tokens:
    """The tokens that a layer hands to its MLP; a merged token lies at the mean of all that it stands for."""
    if reduction.keep_rates:
        rate, patches = reduction.keep_rates[index], len(x) - prefix
        num_kept = patches if rate is None else math.ceil(rate * patches - 1e-9)
        if patches - num_kept < 2:
            return Tokens(x, tokens.sizes, tokens.places, tokens.members, tokens.active)
        x, sizes, source = slow.fuse(x, tokens.sizes, attended, num_kept, prefix)
        return follow(x, sizes, source, tokens, start)
    if reduction.steps:
        step = reduction.steps[index]
        if step is None:
            return Tokens(x, tokens.sizes, tokens.places, tokens.members, tokens.active)
        return follow(*step(x, tokens.sizes, metric, attended, prefix, len(start.x) - prefix), tokens, start)
    r = reduction.r[index]
    if r == 0:
        return Tokens(x, tokens.sizes, tokens.places, tokens.members, tokens.active)
    if not reduction.soft:
        pairs = slow.hard_matching(metric, r, prefix, tokens.sizes)
        x, sizes, source, _ = slow.hard_merge(x, tokens.sizes, pairs, prefix)
        return follow(x, sizes, source, tokens, start)
    # What the tokens carry is moved as their features are.
    carried = x if tokens.places is None else torch.cat([x, tokens.places], dim=1)
    padded = bool((start.sizes == 0).any())
    carried, sizes = slow.soft_merge(
        carried, tokens.sizes, metric, tokens.active, r, prefix, padded=padded, **reduction.relaxation
    )
    order = slow.sort_by_size(sizes, tokens.active, prefix)
    places = None if tokens.places is None else carried[order][:, x.shape[1] :]
    members = [tokens.members[i] for i in order]
    return Tokens(carried[order][:, : x.shape[1]], sizes[order], places, members, tokens.active - r)


def follow(x: Tensor, sizes: Tensor, source: list[int], tokens: Tokens, start: Tokens) -> Tokens:
    """The tokens that a source map leads to."""
    members = [
        sorted(m for i, place in enumerate(source) if place == new for m in tokens.members[i]) for new in range(len(x))
    ]
    places = None if start.places is None else torch.stack([start.places[group].mean(dim=0) for group in members])
    return Tokens(x, sizes, places, members, len(x))


def learned_of(weights: Weights, name: str) -> Tensor | None:
    """What an encoder has learned under a name, wherever the encoder is in the model."""
    return next((value for key, value in weights.items() if key.endswith(name)), None)


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


def relative_bias(table: Tensor, places: Tensor, original: Tensor, prefix: int) -> Tensor:
    """BEiT's bias between tokens, each at the patch nearest to its place: table [(2h-1)(2w-1) + 3, H] -> [H, n, n].

    The last three rows are those from CLS to a patch, from a patch to CLS, and from CLS to itself.
    """
    height, width = (int(side) + 1 for side in original.max(dim=0).values.tolist())
    nearest = [(round(row), round(column)) for row, column in places.tolist()]
    index = []
    for i, (row, column) in enumerate(nearest):
        for j, (other_row, other_column) in enumerate(nearest):
            if i < prefix or j < prefix:
                index.append(len(table) - (1 if i < prefix and j < prefix else 3 if i < prefix else 2))
            else:
                down, right = row - other_row + height - 1, column - other_column + width - 1
                index.append(down * (2 * width - 1) + right)
    return table[index].T.unflatten(1, (len(nearest), len(nearest)))


def rotate(x: Tensor, places: Tensor, anatomy: Anatomy) -> Tensor:
    """DINOv3's rotary positions: the pairs of a head, as complex numbers, turn with row and then with column.

    x [n, H·d], places [n, 2] between -1 and 1; prefix tokens are not turned.
    """
    heads = []
    for part in x.chunk(anatomy.heads, dim=1):
        real, imaginary = part.chunk(2, dim=1)
        quarter = real.shape[1] // 2
        frequencies = torch.tensor([anatomy.theta ** (-j / quarter) for j in range(quarter)], dtype=x.dtype)
        angles = math.tau * torch.cat([places[:, :1] * frequencies, places[:, 1:] * frequencies], dim=1)
        turned = torch.complex(real, imaginary) * torch.complex(angles.cos(), angles.sin())
        whole = torch.cat([turned.real, turned.imag], dim=1)
        heads.append(torch.cat([part[: anatomy.prefix], whole[anatomy.prefix :]]))
    return torch.cat(heads, dim=1)
