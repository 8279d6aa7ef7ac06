"""Soft grouping and soft merging, the relaxation that trains the embedding (docs/method.md section 4)."""

from typing import Any

import torch
from torch import Tensor

from .autocast import without_autocast
from .matching import Matching, bipartite_soft_matching, cosine_scores, put_empty_first
from .merging import take_tokens
from .splitting import split_even_odd


_EPSILON = torch.finfo(torch.float32).eps


def soft_grouping(
    scores: Tensor, r: int, top_k: int = 3, score_temperature: float = 0.1, assignment_temperature: float = 0.1
) -> Tensor:
    """Relax "merge r rows, each into one column": scores [B, A, B'] -> assignment [B, A, B'] in [0, 1], float32.

    Each row keeps its `top_k` best columns. Then r rounds of a softmax over the image choose rows without replacement.
    A round suppresses all entries of a row alike, so the rounds run on one number per row; values and gradients equal
    those of the definition over all entries. Row sums are at most 1.
    """
    values, columns = scores.float().topk(min(top_k, scores.shape[-1]), dim=-1)  # [B, A, k]
    logits = values / (score_temperature * assignment_temperature)
    row_logits = logits.logsumexp(dim=-1)  # [B, A]
    chosen = torch.zeros_like(row_logits)
    for _ in range(r):
        probability = row_logits.softmax(dim=-1)
        chosen = chosen + probability
        row_logits = row_logits + torch.log1p(-probability.clamp(max=1 - _EPSILON)) / assignment_temperature
    chosen = chosen / chosen.detach().clamp(min=1)
    kept = logits.softmax(dim=-1) * chosen.unsqueeze(-1)
    return torch.zeros_like(scores, dtype=torch.float32).scatter(-1, columns, kept)


def soft_assignment(
    metric: Tensor,
    num_active: int,
    r: int,
    num_prefix_tokens: int = 1,
    empty: Tensor | None = None,
    **relaxation: Any,
) -> Tensor:
    """The share of every A token that goes into each B token: metric [B, N, d] -> [B, a, b] in [0, 1], float32.

    Only the first `num_active` tokens take part. Behind the prefix, A is the first of them and every second from it, B
    the others. `empty` [B, N] marks padding, which merges before all other tokens. `relaxation` are options of
    `soft_grouping`. Raises ValueError unless 0 ≤ r ≤ (num_active - num_prefix_tokens) // 2.
    """
    largest = (num_active - num_prefix_tokens) // 2
    if not 0 <= r <= largest:
        raise ValueError(
            f"r={r} does not fit {num_active} active tokens of which {num_prefix_tokens} are prefix: "
            f"0 to {largest} would."
        )
    a, b = _soft_split(num_active, num_prefix_tokens)
    with without_autocast(metric.device.type):
        scores = cosine_scores(metric[:, a], metric[:, b])
        if empty is not None:
            scores = put_empty_first(scores, empty[:, a], empty[:, b])
        return soft_grouping(scores, r, **relaxation)


def _soft_split(num_active: int, num_prefix_tokens: int) -> tuple[slice, slice]:
    return slice(num_prefix_tokens, num_active, 2), slice(num_prefix_tokens + 1, num_active, 2)


def move_mass(
    x: Tensor, sizes: Tensor, assignment: Tensor, num_active: int, num_prefix_tokens: int = 1
) -> tuple[Tensor, Tensor]:
    """Merge softly along an assignment: x [B, N, D], sizes [B, N], assignment [B, a, b] -> x, sizes.

    No token leaves; a token that was merged away has a size near 0. Positions do not change; `size_order` sorts them
    for the next layer. Computes in float32; `x` keeps its dtype.
    """
    a, b = _soft_split(num_active, num_prefix_tokens)
    with without_autocast(x.device.type):
        size_a, size_b = sizes[:, a], sizes[:, b]
        flow = assignment.transpose(1, 2)  # [B, b, a]
        new_size_b = size_b + (flow @ size_a.unsqueeze(-1)).squeeze(-1)
        total = size_b.unsqueeze(-1) * x[:, b].float() + flow @ (size_a.unsqueeze(-1) * x[:, a].float())
        # A B token of size 0 that no token joins becomes 0.
        new_b = total / new_size_b.clamp(min=_EPSILON).unsqueeze(-1)
        left = 1 - assignment.sum(dim=-1)
        # The remaining share is clipped to [0, 1]; the gradient passes straight through the clip.
        new_size_a = size_a * (left + (left.clamp(0, 1) - left).detach())
    at_a, at_b = (torch.arange(s.start, s.stop, s.step, device=x.device) for s in (a, b))
    x = x.index_copy(1, at_b, new_b.to(x.dtype))
    return x, sizes.index_copy(1, at_b, new_size_b).index_copy(1, at_a, new_size_a)


def size_order(sizes: Tensor, num_active: int, num_prefix_tokens: int = 1) -> Tensor:
    """The permutation that sorts the active tokens by size, largest first: [B, N] -> [B, N], int64.

    Prefix tokens and inactive tokens keep their places. Most sizes differ from 1 only by rounding, and the order of
    these affects later layers; as in the published method, A comes before B and the sort is not stable.
    """
    batch, num_tokens = sizes.shape
    arange = torch.arange(num_tokens, device=sizes.device)
    free = arange[num_prefix_tokens:num_active]
    free = torch.cat([free[0::2], free[1::2]])
    order = sizes.detach()[:, free].argsort(dim=-1, descending=True)
    head, tail = arange[:num_prefix_tokens], arange[num_active:]
    return torch.cat([head.expand(batch, -1), free[order], tail.expand(batch, -1)], dim=1)


def permute_tokens(x: Tensor, order: Tensor) -> Tensor:
    """Reorder the tokens of each image: [B, N] or [B, N, D], order [B, N]."""
    return x.gather(1, order if x.dim() == 2 else order.unsqueeze(-1).expand_as(x))


def straight_through_matching(
    metric: Tensor, r: int, num_prefix_tokens: int = 1, empty: Tensor | None = None, **relaxation: Any
) -> tuple[Matching, Tensor]:
    """The hard matching of a metric [B, N, d], and its flow [B, a, b]: 0 and 1, with the gradients of soft grouping.

    The flow is the share of every A token that goes into each B token. Gradients reach the `top_k` best partners of
    every A token. `relaxation` are options of `soft_grouping`. Raises ValueError if r does not fit.
    """
    matching = bipartite_soft_matching(metric.detach(), r, num_prefix_tokens, empty)
    scores = cosine_scores(*split_even_odd(metric, num_prefix_tokens))
    if empty is not None:
        scores = put_empty_first(scores, *split_even_odd(empty, num_prefix_tokens))
    with without_autocast(metric.device.type):
        soft = soft_grouping(scores, r, **relaxation)
    first_b = matching.staying.shape[1] - scores.shape[2]
    edges = (matching.leaving - num_prefix_tokens) // 2 * scores.shape[2] + matching.joined - first_b
    hard = torch.zeros_like(soft).flatten(1).scatter(1, edges, 1.0).view_as(soft)
    return matching, hard + (soft - soft.detach())


def merge_along_flow(
    x: Tensor, sizes: Tensor | None, matching: Matching, flow: Tensor, num_prefix_tokens: int = 1
) -> tuple[Tensor, Tensor]:
    """Merge as `merge_tokens` does, with gradients to the matching's flow [B, a, b].

    x [B, N, D], sizes [B, N] or None -> [B, N - r, D], [B, N - r]. The flow's gradient also covers tokens that stayed
    but could have left, and other partners of tokens that left. Computes in float32; `x` keeps its dtype.
    """
    if sizes is None:
        sizes = torch.ones(x.shape[:2], dtype=torch.float32, device=x.device)
    a, b = split_even_odd(x, num_prefix_tokens)
    size_a, size_b = split_even_odd(sizes, num_prefix_tokens)
    with without_autocast(x.device.type):
        flow_size = flow.transpose(1, 2) * size_a.unsqueeze(1)  # [B, b, a]
        new_size_b = size_b + flow_size.sum(dim=-1)
        total = torch.baddbmm(b.float() * size_b.unsqueeze(-1), flow_size, a.float())
        mean = (total / new_size_b.clamp(min=_EPSILON).unsqueeze(-1)).to(x.dtype)
        left_of_a = size_a * (1 - flow.sum(dim=-1))
    unmerged = matching.staying[:, : matching.staying.shape[1] - b.shape[1]]  # prefix and unmerged A
    rows = (unmerged[:, num_prefix_tokens:] - num_prefix_tokens) // 2
    sizes = torch.cat([sizes[:, :num_prefix_tokens], left_of_a.gather(1, rows), new_size_b], dim=1)
    return torch.cat([take_tokens(x, unmerged), mean], dim=1), sizes
