"""The two sets of bipartite matching: A, the non-prefix tokens at even positions, and B, those at odd ones."""

from torch import Tensor


def split_counts(num_tokens: int, num_prefix_tokens: int) -> tuple[int, int]:
    """Number of non-prefix tokens at even and at odd positions."""
    even = (num_tokens + 1) // 2 - (num_prefix_tokens + 1) // 2
    return even, num_tokens - num_prefix_tokens - even


def split_even_odd(x: Tensor, num_prefix_tokens: int) -> tuple[Tensor, Tensor]:
    """Views on the non-prefix tokens at even (A) and odd (B) positions: [B, N, ...] -> [B, a, ...], [B, b, ...]."""
    first_even = num_prefix_tokens + num_prefix_tokens % 2
    first_odd = num_prefix_tokens + 1 - num_prefix_tokens % 2
    return x[:, first_even::2], x[:, first_odd::2]
