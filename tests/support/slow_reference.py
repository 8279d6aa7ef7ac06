"""docs/method.md written out with Python loops, one image at a time: what the fast code is tested against.

Nothing here calls the package. A matching is a list of pairs (position that leaves, position that it joins).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


FLOAT32_EPSILON = 2.0**-23
# Tokens [n, D], their sizes [n], and the source map.
Joined = tuple[Tensor, Tensor, list[int]]


def cosine(u: Tensor, v: Tensor) -> Tensor:
    return (u * v).sum() / (u.norm() * v.norm())


def hard_matching(metric: Tensor, r: int, prefix: int, sizes: Tensor | None = None) -> list[tuple[int, int | None]]:
    """Section 3, for one image [N, d]: the r best pairs, equal scores to the lower position.

    With sizes [N], tokens of size 0 are padding: what of it is in A leaves first, and joins nobody (None).
    """
    directions = [row / row.norm() for row in metric.double()]
    free = range(prefix, len(metric))
    real = [i for i in free if sizes is None or sizes[i] > 0]
    best = []
    for i in (i for i in real if i % 2 == 0):
        scores = [((directions[i] @ directions[j]).item(), -j) for j in real if j % 2 == 1]
        if scores:
            score, minus_j = max(scores)
            best.append((-score, i, -minus_j))
    padding = [(i, None) for i in free if i % 2 == 0 and i not in real]
    return [*padding, *((i, j) for _, i, j in sorted(best))][:r]


def hard_merge(
    x: Tensor, sizes: Tensor, pairs: list[tuple[int, int | None]], prefix: int
) -> tuple[Tensor, Tensor, list[int], dict[int, int]]:
    """Section 3, for one image: features, sizes, the source map, and {output: input} of the tokens nobody joined.

    Whoever leaves and joins nobody is at -1 in the source map.
    """
    x, sizes = x.double(), sizes.double()
    free = range(prefix, len(x))
    leaving = {i for i, _ in pairs}
    order = [
        *range(prefix),
        *(i for i in free if i % 2 == 0 and i not in leaving),
        *(i for i in free if i % 2 == 1),
    ]
    rows, new_sizes, source, alone = [], [], [-1] * len(x), {}
    for position, i in enumerate(order):
        members = [i, *(a for a, b in pairs if b == i)]
        mass = sum(sizes[k] for k in members)
        rows.append(x[i] if len(members) == 1 else sum(sizes[k] * x[k] for k in members) / mass)
        new_sizes.append(mass)
        for k in members:
            source[k] = position
        if len(members) == 1:
            alone[position] = i
    return torch.stack(rows), torch.stack(new_sizes), source, alone


def soft_grouping(scores: Tensor, r: int, top_k: int = 3, t1: float = 0.1, t2: float = 0.1) -> Tensor:
    """Section 4, for one image [A, B'], over all kept entries (no shortcut); differentiable."""
    num_a, num_b = scores.shape
    kept = [
        (i, j) for i in range(num_a) for j in sorted(range(num_b), key=lambda j: (-scores[i, j].item(), j))[:top_k]
    ]
    rows, columns = (torch.tensor(index) for index in zip(*kept, strict=True))

    def row_sums(entries: Tensor) -> Tensor:
        return torch.zeros(num_a, dtype=entries.dtype).index_add(0, rows, entries)

    x = scores[rows, columns] / t1
    khot = torch.zeros_like(x)
    for _ in range(r):
        p = (x / t2).softmax(dim=0)
        khot = khot + p
        x = x + (1 - row_sums(p)).clamp(min=FLOAT32_EPSILON).log()[rows]
    khot = khot / row_sums(khot).detach().clamp(min=1)[rows]
    return torch.zeros_like(scores).index_put((rows, columns), khot)


def soft_merge(
    x: Tensor,
    sizes: Tensor,
    metric: Tensor,
    active: int,
    r: int,
    prefix: int,
    top_k: int = 3,
    t1: float = 0.1,
    t2: float = 0.1,
    padded: bool = False,
) -> tuple[Tensor, Tensor]:
    """Section 4, for one image, before the tokens are sorted; differentiable.

    If it is padded, a token of size 0 outranks every cosine, and nothing else is drawn to one.
    """
    a, b = list(range(prefix, active, 2)), list(range(prefix + 1, active, 2))
    directions = [row / row.norm() for row in metric]
    scores = torch.stack([torch.stack([directions[i] @ directions[j] for j in b]) for i in a])
    if padded:
        scores[:, sizes[b] == 0] = -2.0
        scores[sizes[a] == 0] = 2.0
    assignment = soft_grouping(scores, r, top_k, t1, t2)
    new_x, new_sizes = list(x), list(sizes)
    for shares, j in zip(assignment.T, b, strict=True):
        flow = shares * sizes[a]
        new_sizes[j] = sizes[j] + flow.sum()
        if new_sizes[j] > 0:
            new_x[j] = (sizes[j] * new_x[j] + flow @ x[a]) / new_sizes[j]
    for shares, i in zip(assignment, a, strict=True):
        left = 1 - shares.sum()
        new_sizes[i] = sizes[i] * (left + (left.clamp(0, 1) - left).detach())
    return torch.stack(new_x), torch.stack(new_sizes)


def sort_by_size(sizes: Tensor, active: int, prefix: int) -> list[int]:
    """Section 4, for one image: positions by size, descending; A in front of B among equals."""
    free = [*range(prefix, active, 2), *range(prefix + 1, active, 2)]
    return [*range(prefix), *sorted(free, key=lambda i: -sizes[i].item()), *range(active, len(sizes))]


def fuse(x: Tensor, sizes: Tensor, attended: Tensor, num_kept: int, prefix: int) -> tuple[Tensor, Tensor, list[int]]:
    """Section 7, for one image: keep the patches attended to most [N], fuse the others; and the source map."""
    patches = range(prefix, len(x))
    ranked = sorted(patches, key=lambda i: -attended[i].item())
    staying, fused = [*range(prefix), *sorted(ranked[:num_kept])], ranked[num_kept:]
    rows = [*(x[i] for i in staying), sum(attended[i] * x[i] for i in fused)]
    new_sizes = [*(sizes[i] for i in staying), sum(sizes[i] for i in fused)]
    source = [staying.index(i) if i in staying else len(staying) for i in range(len(x))]
    return torch.stack(rows), torch.stack(new_sizes), source


def join(x: Tensor, sizes: Tensor, weights: Tensor, pairs: list[tuple[int, int | None]]) -> Joined:
    """For one image: weighted means of the tokens that stay, in their order, and of those that joined them."""
    staying = [i for i in range(len(x)) if i not in dict(pairs)]
    groups = [[i, *(a for a, b in pairs if b == i)] for i in staying]
    rows = [sum(weights[k] * x[k] for k in group) / sum(weights[k] for k in group) for group in groups]
    rows = [x[group[0]] if len(group) == 1 else row for group, row in zip(groups, rows, strict=True)]
    source = [next((place for place, group in enumerate(groups) if i in group), -1) for i in range(len(x))]
    return torch.stack(rows), torch.stack([sum(sizes[k] for k in group) for group in groups]), source


def energy(cosines: Tensor, margin: float) -> float:
    """Section 9, PiToMe: the mean of ELU(cosine - margin) of a token and all tokens, itself among them."""
    above = [value - margin for value in cosines.tolist()]
    return sum(value if value > 0 else math.exp(value) - 1 for value in above) / len(above)


def merge_by_energy(x: Tensor, sizes: Tensor, metric: Tensor, prefix: int, r: int, margin: float) -> Joined:
    """Section 9, PiToMe, for one image. Tokens of size 0 are padding, which counts as of the highest energy."""
    free = range(prefix, len(x))
    real = [i for i in free if sizes[i] > 0]
    directions = torch.stack([row / row.norm() for row in metric])
    energies = {i: energy(directions[real] @ directions[i], margin) if i in real else math.inf for i in free}
    ranked = sorted(free, key=lambda i: (-energies[i], i))[: 2 * r]
    a, b = ranked[0::2], ranked[1::2]
    pairs: list[tuple[int, int | None]] = []
    for i in a:
        found = [((directions[i] @ directions[j]).item(), -place, j) for place, j in enumerate(b) if j in real]
        pairs.append((i, max(found)[2] if i in real else None))
    return join(x, sizes, sizes, pairs)


def squeeze(x: Tensor, sizes: Tensor, attended: Tensor, prefix: int, num_kept: int) -> Joined:
    """Section 9, TPS, for one image: keep the patches of highest score [N], each other one joins its host.

    Tokens of size 0 are padding, which is pruned first: it joins no token, and no token joins it.
    """
    ranked = sorted(range(prefix, len(x)), key=lambda i: -attended[i].item() if sizes[i] > 0 else math.inf)
    kept, pruned = sorted(ranked[:num_kept]), sorted(ranked[num_kept:])
    weights, pairs = [torch.tensor(math.e, dtype=x.dtype)] * len(x), list[tuple[int, int | None]]()
    hosts = [j for j in kept if sizes[j] > 0]
    for i in pruned:
        cosines = [cosine(x[i], x[j]) for j in hosts] if sizes[i] > 0 else []
        best = max(range(len(cosines)), key=lambda place: cosines[place].item(), default=None)
        if best is not None:
            weights[i] = cosines[best].exp()
        pairs.append((i, None if best is None else hosts[best]))
    return join(x, sizes, torch.stack([weight.to(x.dtype) for weight in weights]), pairs)


def fuse_pairs(x: Tensor, sizes: Tensor, metric: Tensor, prefix: int, r: int, prune: bool) -> Joined:
    """Section 9, ToFu, for one image: ToMe's pairs, pruned or merged at the length of the longest."""
    pairs = hard_matching(metric, r, prefix, sizes)
    merged, new_sizes, source, _ = hard_merge(x, sizes, pairs, prefix)
    rows = []
    for place, row in enumerate(merged):
        members = [i for i in range(len(x)) if source[i] == place]
        host = next(i for i in members if i not in dict(pairs))
        rows.append(x[host] if prune or len(members) == 1 else row / row.norm() * max(x[i].norm() for i in members))
    return torch.stack(rows), new_sizes, source


def attention_weights(
    q: Tensor, k: Tensor, heads: int, scaling: float, sizes: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Section 1, for one image: the exponentials are multiplied by the sizes. q [M, H·d], k [N, H·d] -> [H, M, N].

    `sizes` are [N], or [H, N] where heads count them differently, or [1, M, N] where queries do. `bias` [H, M, N] is
    added to the scores.
    """
    weights = []
    for head, (queries, keys) in enumerate(zip(q.chunk(heads, dim=1), k.chunk(heads, dim=1), strict=True)):
        for i, query in enumerate(queries):
            scores = keys @ query * scaling
            if bias is not None:
                scores = scores + bias[head, i]
            exponentials = (scores - scores.max().detach()).exp()
            if sizes is not None:
                exponentials = exponentials * (
                    sizes if sizes.dim() == 1 else sizes[head] if sizes.dim() == 2 else sizes[0, i]
                )
            weights.append(exponentials / exponentials.sum())
    return torch.stack(weights).unflatten(0, (heads, len(q)))


def powers(sizes: Tensor, exponents: Tensor) -> Tensor:
    """What tokens count for in each head: sizes [N], exponents [H] -> [H, N]. A token of no size counts for none."""
    rows = [torch.stack([size**exponent if size > 0 else size for size in sizes]) for exponent in exponents]
    return torch.stack(rows)


def lengthen(x: Tensor, norms: Tensor, share: Tensor) -> Tensor:
    """Tokens [N, D] times (mean length of what each is the mean of [N], by its own length) to the power `share` [1].

    A token of length 0 has no direction to grow in.
    """
    rows = [
        token * (norm / token.norm()) ** share if token.norm() > 0 else token
        for token, norm in zip(x, norms, strict=True)
    ]
    return torch.stack(rows)


def mix(weights: Tensor, v: Tensor) -> Tensor:
    """What attention makes of the values, head by head: [H, M, N], [N, H·d] -> [M, H·d]."""
    return torch.cat([share @ part for share, part in zip(weights, v.chunk(len(weights), dim=1), strict=True)], dim=1)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, scaling: float, sizes: Tensor | None) -> Tensor:
    """Section 1, for one image: q [M, H·d], k and v [N, H·d] -> [M, H·d]."""
    return mix(attention_weights(q, k, heads, scaling, sizes), v)
