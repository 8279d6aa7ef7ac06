"""Keep some tokens and fuse the others into one (docs/method.md section 7)."""

import torch
from torch import Tensor

from .autocast import without_autocast
from .matching import descending_order
from .merging import take_tokens


def split_by_score(scores: Tensor, num_kept: int, num_prefix_tokens: int = 1) -> tuple[Tensor, Tensor]:
    """Positions of the k tokens with the highest scores, and of the others: [B, N] -> [B, k], [B, N - P - k].

    Both are ascending and without prefix tokens. Of equal scores, the lower position is kept.
    """
    order = descending_order(scores[:, num_prefix_tokens:])
    kept, others = order[:, :num_kept], order[:, num_kept:]
    return kept.sort(dim=-1).values + num_prefix_tokens, others.sort(dim=-1).values + num_prefix_tokens


def fuse_tokens(
    x: Tensor, sizes: Tensor, weights: Tensor, kept: Tensor, fused: Tensor, num_prefix_tokens: int = 1
) -> tuple[Tensor, Tensor]:
    """Replace the fused tokens by their weighted sum, at the end: x [B, N, D], sizes and weights [B, N].

    Returns x [B, P + k + 1, D] in its own dtype and sizes [B, P + k + 1]; the sum runs in float32.
    """
    shares = weights.gather(1, fused).float().unsqueeze(-1)
    with without_autocast(x.device.type):
        token = (take_tokens(x, fused).float() * shares).sum(dim=1, keepdim=True).to(x.dtype)
    x = torch.cat([x[:, :num_prefix_tokens], take_tokens(x, kept), token], dim=1)
    total = sizes.gather(1, fused).sum(dim=1, keepdim=True)
    return x, torch.cat([sizes[:, :num_prefix_tokens], sizes.gather(1, kept), total], dim=1)


def fused_source_map(kept: Tensor, num_tokens: int, num_prefix_tokens: int = 1) -> Tensor:
    """The source map of `fuse_tokens`: [B, k] -> int64 [B, N]; all fused tokens map to the last position."""
    batch, num_kept = kept.shape
    last = num_prefix_tokens + num_kept
    source = torch.full((batch, num_tokens), last, dtype=torch.int64, device=kept.device)
    source[:, :num_prefix_tokens] = torch.arange(num_prefix_tokens, device=kept.device)
    return source.scatter(1, kept, torch.arange(num_prefix_tokens, last, device=kept.device).expand(batch, -1))
