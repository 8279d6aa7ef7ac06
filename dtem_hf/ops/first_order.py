"""First-order change of the output for every possible merge: every edge of the bipartite graph."""

import torch
from torch import Tensor

from .autocast import without_autocast
from .splitting import split_even_odd


_SMALLEST_TOTAL = 1e-12


def first_order_change(x: Tensor, sizes: Tensor | None, gradient: Tensor, num_prefix_tokens: int = 1) -> Tensor:
    """The first-order change of a function of the tokens for every pair that could merge: [B, a, b] float32.

    `x` and the function's `gradient` at x are [B, N, D], `sizes` [B, N], or None if all are 1. Entry (i, j): A token i
    and B token j both become their size-weighted mean. If both have size 0, the entry is 0.
    """
    if sizes is None:
        sizes = torch.ones(x.shape[:2], dtype=torch.float32, device=x.device)
    with without_autocast(x.device.type):
        a, b = split_even_odd(x.float(), num_prefix_tokens)
        grad_a, grad_b = split_even_odd(gradient.float(), num_prefix_tokens)
        size_a, size_b = split_even_odd(sizes.unsqueeze(-1), num_prefix_tokens)
        size_b = size_b.transpose(1, 2)
        # A token moves towards its partner by the partner's share of their size.
        pull_a = grad_a @ b.transpose(1, 2) - (grad_a * a).sum(dim=-1, keepdim=True)
        pull_b = a @ grad_b.transpose(1, 2) - (grad_b * b).sum(dim=-1).unsqueeze(1)
        return (size_b * pull_a + size_a * pull_b) / (size_a + size_b).clamp(min=_SMALLEST_TOTAL)
