"""Matchings of PiToMe and TPS: which tokens leave, and which token each of them joins (docs/method.md section 9)."""

import torch
from torch import Tensor

from .matching import Matching, cosine_scores, descending_order, put_empty_first
from .merging import take_tokens


def matching_of_pairs(leaving: Tensor, host: Tensor, num_tokens: int) -> Matching:
    """The matching in which tokens at `leaving` [B, r] join tokens at `host` [B, r]; the others keep their order."""
    positions = torch.arange(num_tokens, device=leaving.device).expand(leaving.shape[0], -1)
    marked = positions.scatter(1, leaving, num_tokens)
    place = (marked < num_tokens).cumsum(dim=1) - 1
    staying = marked.sort(dim=-1).values[:, : num_tokens - leaving.shape[1]]
    return Matching(leaving, place.gather(1, host), staying)


def energies(similarity: Tensor, margin: float) -> Tensor:
    """PiToMe's energy, the mean over j of ELU(cos(i, j) - margin): [B, n, n] -> [B, n].

    Tokens that are similar to many others have a high energy.
    """
    return torch.nn.functional.elu(similarity - margin).mean(dim=-1)


def match_by_energy(
    metric: Tensor, r: int, margin: float, num_prefix_tokens: int = 1, empty: Tensor | None = None
) -> Matching:
    """PiToMe: the 2r tokens of highest energy go alternately to A and B, and every A joins its most similar B.

    `metric` [B, N, d]; of equal energies, the lower position comes first. `empty` [B, N] marks padding, which does not
    count in energies and merges before all other tokens. Raises ValueError unless 1 ≤ r ≤ (N - P) // 2.
    """
    free = metric[:, num_prefix_tokens:]
    if not 1 <= r <= free.shape[1] // 2:
        raise ValueError(
            f"r={r} does not fit {free.shape[1]} tokens beside the prefix: 1 to {free.shape[1] // 2} would."
        )
    similarity = cosine_scores(free, free)  # [B, n, n]
    if empty is None:
        energy = energies(similarity, margin)
    else:
        empty = empty[:, num_prefix_tokens:]
        # ELU(0) = 0: a similarity of `margin` adds nothing, so the means rank like the sums over real tokens.
        energy = energies(similarity.masked_fill(empty.unsqueeze(1), margin), margin)
        energy = energy.masked_fill(empty, torch.inf)
    order = descending_order(energy)
    a, b = order[:, 0 : 2 * r : 2], order[:, 1 : 2 * r : 2]
    scores = take_tokens(similarity, a).gather(2, b.unsqueeze(1).expand(-1, r, -1))
    if empty is not None:
        scores = put_empty_first(scores, empty.gather(1, a), empty.gather(1, b))
    host = b.gather(1, scores.max(dim=-1).indices)  # the first of equal maxima
    return matching_of_pairs(a + num_prefix_tokens, host + num_prefix_tokens, metric.shape[1])


def match_pruned_to_kept(
    x: Tensor, kept: Tensor, pruned: Tensor, empty: Tensor | None = None
) -> tuple[Matching, Tensor]:
    """TPS: every pruned token joins the most similar kept token; x [B, N, D], positions [B, k] and [B, r].

    Returns the matching and the weights of the means [B, N] float32: e to the power of the cosine for pruned tokens, e
    for kept tokens. `empty` [B, N] marks padding; pruned padding has weight 0.
    """
    scores = cosine_scores(take_tokens(x, pruned), take_tokens(x, kept))
    if empty is not None:
        scores = put_empty_first(scores, empty.gather(1, pruned), empty.gather(1, kept))
    cosine, best = scores.max(dim=-1)  # the first of equal maxima
    counted = cosine.exp() if empty is None else cosine.exp().masked_fill(empty.gather(1, pruned), 0.0)
    weights = torch.full(x.shape[:2], torch.e, dtype=cosine.dtype, device=x.device)
    return matching_of_pairs(pruned, kept.gather(1, best), x.shape[1]), weights.scatter(1, pruned, counted)
