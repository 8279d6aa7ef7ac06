"""dTPS in training: pruned tokens stay in the sequence, and a mask says which are kept (docs/method.md section 9)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .matching import cosine_scores


def draw_kept(log_probabilities: Tensor, kept: Tensor) -> Tensor:
    """Draw which of the `kept` tokens [B, n] are kept further, by log-probabilities to keep and to prune [B, n, 2].

    Returns [B, n]: 1 or 0, with the gradients of Gumbel-softmax at temperature 1. An image that would keep no token
    keeps the most probable one.
    """
    drawn = F.gumbel_softmax(log_probabilities, hard=True)[..., 0] * kept
    none = (drawn.detach() < 0.5).all(dim=1, keepdim=True)
    best = log_probabilities[..., 0].masked_fill(kept <= 0, -torch.inf).argmax(dim=1, keepdim=True)
    return drawn + torch.zeros_like(drawn).scatter(1, best, none.to(drawn.dtype))


def squeeze_in_place(x: Tensor, candidates: Tensor, pruned: Tensor) -> tuple[Tensor, Tensor]:
    """TPS without removing tokens: the host of every token among the candidates, and the weights of the means.

    x [B, N, D], bool `candidates` and `pruned` [B, N] -> int64 [B, N] and float32 [B, N]; weights as in
    `match_pruned_to_kept`.
    """
    scores = cosine_scores(x, x).masked_fill(~candidates.unsqueeze(1), -2.0)
    cosine, host = scores.max(dim=-1)  # the first of equal maxima
    return host, torch.where(pruned, cosine.exp(), torch.e)
