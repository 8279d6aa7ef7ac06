"""Bipartite soft matching: which r tokens are merged, and into which partner (docs/method.md section 3).

Positions count over the whole sequence. Even positions form A, odd positions form B. The first `num_prefix_tokens`
tokens (CLS, distillation, registers) are in neither set, which has the same effect as giving them scores of -inf.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import kernels
from .autocast import without_autocast
from .forms import exports, is_exporting
from .splitting import split_even_odd


_SHORTEST = 1e-12  # the eps of F.normalize


class Matching(NamedTuple):
    """Which tokens leave, which they join, and which stay.

    All are int64. `leaving` [B, r]: input positions of the tokens that leave; bipartite soft matching puts the best
    score first. `joined` [B, r]: output positions of the tokens that they join. `staying` [B, N - r]: input positions
    of the tokens that stay, in the order of the output.
    """

    leaving: Tensor
    joined: Tensor
    staying: Tensor


def cosine_scores(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarity of two token sets in float32, also under autocast: [B, a, d], [B, b, d] -> [B, a, b]."""
    with without_autocast(a.device.type):
        return F.normalize(a.float(), dim=-1) @ F.normalize(b.float(), dim=-1).transpose(1, 2)


def descending_order(x: Tensor) -> Tensor:
    """Indices that sort the last dimension, largest first; equal values keep their order."""
    if is_exporting():  # ONNX has no stable sort, and torch's topk is not stable
        return x.topk(x.shape[-1]).indices if exports("scatter", "one_hot") else _order_by_rank(x)
    return x.argsort(dim=-1, descending=True, stable=True)


def _order_by_rank(x: Tensor) -> Tensor:
    """`descending_order` of [B, n] by comparing all pairs: OpenVINO's sort is unstable, or five times as slow."""
    places = torch.arange(x.shape[1], device=x.device)
    other, own = x.unsqueeze(1), x.unsqueeze(2)
    ahead = (other > own) | ((other == own) & (places < places.unsqueeze(1)))
    rank = ahead.long().sum(dim=-1)
    return torch.zeros_like(rank).scatter(1, rank, places.expand_as(rank))


def put_empty_first(scores: Tensor, empty_a: Tensor, empty_b: Tensor) -> Tensor:
    """Make padding tokens merge before all others: scores [B, A, B'], bool [B, A] and [B, B'] mark padding.

    Merging a padding token away changes nothing, so its scores are above every cosine. Scores of padding partners are
    below every cosine: two real tokens that merge into the same padding token need not be similar.
    """
    scores = scores.masked_fill(empty_b.unsqueeze(1), -2.0)
    return scores.masked_fill(empty_a.unsqueeze(2), 2.0)


def _best_partner(metric: Tensor, num_prefix_tokens: int, empty: Tensor | None) -> tuple[Tensor, Tensor]:
    """The highest score of every A token and its first B token: [B, N, d] -> float32 and int64 [B, a]."""
    with without_autocast(metric.device.type):
        metric = metric.float()
        # The same as F.normalize, without the shape operations that it adds to an exported graph.
        normed = metric / torch.linalg.vector_norm(metric, dim=-1, keepdim=True).clamp(min=_SHORTEST)
        a, b = split_even_odd(normed, num_prefix_tokens)
        scores = torch.bmm(a, b.transpose(1, 2))  # [B, a, b]
    if empty is not None:
        scores = put_empty_first(scores, *split_even_odd(empty, num_prefix_tokens))
    if is_exporting() and exports("openvino"):
        # OpenVINO takes the index of a maximum from a TopK that does not keep the order of equal values.
        best, last = scores.amax(dim=-1, keepdim=True), scores.shape[2] - 1
        places = torch.arange(last + 1, device=scores.device)
        return best.squeeze(-1), torch.where(scores == best, places, last).amin(dim=-1)
    return scores.max(dim=-1)  # the first of equal maxima


def bipartite_soft_matching(
    metric: Tensor, r: int, num_prefix_tokens: int = 1, empty: Tensor | None = None
) -> Matching:
    """Match every A token with its most similar B token and choose the r best pairs (docs/method.md section 3).

    `metric` [B, N, d], any floating dtype; r ≤ (N - P) // 2. Of equal scores, the lower position is taken, so the
    result depends on neither batch size nor device. `empty` [B, N] marks padding, which merges before all other
    tokens. Raises ValueError if r does not fit.
    """
    largest = (metric.shape[1] - num_prefix_tokens) // 2
    if not 0 <= r <= largest:
        raise ValueError(
            f"r={r} does not fit {metric.shape[1]} tokens of which {num_prefix_tokens} are prefix: "
            f"0 to {largest} would."
        )
    if r and empty is None and metric.device.type in kernels.devices and kernels.can_match(metric):
        return Matching(*kernels.match(metric, r, num_prefix_tokens))
    positions = torch.arange(metric.shape[1], device=metric.device).expand(metric.shape[0], -1)
    prefix, (a, b) = positions[:, :num_prefix_tokens], split_even_odd(positions, num_prefix_tokens)
    if r == 0:  # also if a set is empty
        return Matching(positions[:, :0], positions[:, :0], torch.cat([prefix, a, b], dim=1))
    best, partner = _best_partner(metric, num_prefix_tokens, empty)
    order = descending_order(best)
    places = torch.add(num_prefix_tokens + num_prefix_tokens % 2, order, alpha=2)
    leaving, kept = places[:, :r], places[:, r:]
    if is_exporting():  # the ONNX exporter would write a sort as a TopK with a computed k
        kept = kept.topk(kept.shape[1], largest=False).values
    else:
        kept = kept.sort(dim=-1).values
    joined = partner.gather(1, order[:, :r]) + (num_prefix_tokens + kept.shape[1])
    return Matching(leaving, joined, torch.cat([prefix, kept, b], dim=1))
