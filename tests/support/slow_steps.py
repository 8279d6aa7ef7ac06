"""What a method does to the tokens of one image behind a layer's attention or MLP, token by token (docs/method.md)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.support import slow_reference as slow
from tests.support.slow_parts import Weights, gelu, layer_norm, linear


Step = Callable[[Tensor, Tensor, Tensor, Tensor, int, int], slow.Joined]


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


def in_place(tokens: Tokens) -> Tensor:
    """For every token of the first layer, the token that stands for it: [N, D]."""
    place = {member: i for i, members in enumerate(tokens.members) for member in members}
    return tokens.x[[place[i] for i in range(len(place))]]


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


def each_seeing_itself(counted: Tensor) -> Tensor:
    """How often a token counts for each query: as `counted` [N], and for itself once at least: [1, N, N]."""
    rows = []
    for i in range(len(counted)):
        own = counted.detach()[i].clamp(min=1)
        rows.append(torch.stack([own if j == i else counted[j] for j in range(len(counted))]))
    return torch.stack(rows).unsqueeze(0)
