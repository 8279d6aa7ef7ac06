"""Bipartite soft matching: which r tokens are merged, and into which partner (METHOD.md section 3).

Positions are counted over the whole sequence. Even positions form A and odd ones B; the first `num_prefix_tokens`
(CLS, distillation, registers) take part in neither, which is the same as giving their scores -inf, and needs no -inf.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import kernels
from .autocast import without_autocast
from .forms import exports_openvino
from .splitting import split_even_odd


_SHORTEST = 1e-12  # as F.normalize has it


class Matching(NamedTuple):
    """Which tokens leave, which they join, and which stay.

    `leaving` [B, r]: positions of the tokens of A that leave, best score first. `joined` [B, r]: where in the output
    their partners are. `staying` [B, N - r]: positions in the input of the output's tokens, in the output's
    order. int64.
    """

    leaving: Tensor
    joined: Tensor
    staying: Tensor


def cosine_scores(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarity of two token sets in float32, whatever autocast says: [B, a, d], [B, b, d] -> [B, a, b]."""
    with without_autocast(a.device.type):
        return F.normalize(a.float(), dim=-1) @ F.normalize(b.float(), dim=-1).transpose(1, 2)


def descending_order(x: Tensor) -> Tensor:
    """Indices that sort the last dimension, largest first, equal values by position."""
    if torch.compiler.is_exporting() and exports_openvino():
        return _order_by_rank(x)
    if torch.compiler.is_exporting():
        return x.topk(x.shape[-1]).indices  # ONNX has no stable sort; its TopK keeps the order of equal values
    return x.argsort(dim=-1, descending=True, stable=True)


def _order_by_rank(x: Tensor) -> Tensor:
    """`descending_order` of [B, n] without a sort: OpenVINO's is unstable, or five times as slow as comparing all."""
    places = torch.arange(x.shape[1], device=x.device)
    theirs, ours = x.unsqueeze(1), x.unsqueeze(2)
    ahead = (theirs > ours) | ((theirs == ours) & (places < places.unsqueeze(1)))
    rank = ahead.long().sum(dim=-1)
    return torch.zeros_like(rank).scatter(1, rank, places.expand_as(rank))


def put_empty_first(scores: Tensor, empty_a: Tensor, empty_b: Tensor) -> Tensor:
    """Rank padding, which stands for no patch, before all other merges: scores [B, A, B'], bool [B, A] and [B, B'].

    Merging a padding token away changes nothing, so it outranks every cosine. Other tokens merge into padding only
    where no other partner is left: two of them would meet there without being similar.
    """
    scores = scores.masked_fill(empty_b.unsqueeze(1), -2.0)
    return scores.masked_fill(empty_a.unsqueeze(2), 2.0)


def _best_partner(metric: Tensor, num_prefix_tokens: int, empty: Tensor | None) -> tuple[Tensor, Tensor]:
    """The highest score of every A token and the first B token that has it: [B, N, d] -> float32, int64 [B, a]."""
    with without_autocast(metric.device.type):
        metric = metric.float()
        # As F.normalize, which computes shapes to expand the lengths.
        normed = metric / torch.linalg.vector_norm(metric, dim=-1, keepdim=True).clamp(min=_SHORTEST)
        a, b = split_even_odd(normed, num_prefix_tokens)
        scores = torch.bmm(a, b.transpose(1, 2))  # [B, a, b]
    if empty is not None:
        scores = put_empty_first(scores, *split_even_odd(empty, num_prefix_tokens))
    if torch.compiler.is_exporting() and exports_openvino():
        # It reads an index of a maximum from a TopK that keeps no order of ties.
        best, last = scores.amax(dim=-1, keepdim=True), scores.shape[2] - 1
        places = torch.arange(last + 1, device=scores.device)
        return best.squeeze(-1), torch.where(scores == best, places, last).amin(dim=-1)
    return scores.max(dim=-1)  # the first of equal maxima


def bipartite_soft_matching(
    metric: Tensor, r: int, num_prefix_tokens: int = 1, empty: Tensor | None = None
) -> Matching:
    """Match every A token with its most similar B token and choose the r best pairs (METHOD.md section 3).

    `metric` [B, N, d], any floating dtype; r ≤ (N - P) // 2. Equal scores go to the lower position, so the result
    depends on neither batch size nor device. `empty` [B, N] marks padding, which is merged before all else. Raises
    ValueError where r does not fit.
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
    if r == 0:  # also where there is nothing to compare with
        return Matching(positions[:, :0], positions[:, :0], torch.cat([prefix, a, b], dim=1))
    best, partner = _best_partner(metric, num_prefix_tokens, empty)
    order = descending_order(best)
    places = torch.add(num_prefix_tokens + num_prefix_tokens % 2, order, alpha=2)
    leaving, kept = places[:, :r], places[:, r:]
    if torch.compiler.is_exporting():  # ONNX writes a sort as a topk of a computed number
        kept = kept.topk(kept.shape[1], largest=False).values
    else:
        kept = kept.sort(dim=-1).values
    joined = partner.gather(1, order[:, :r]) + (num_prefix_tokens + kept.shape[1])
    return Matching(leaving, joined, torch.cat([prefix, kept, b], dim=1))
