"""Pure tensor functions of token merging: no module, no state, no transformers import."""

from .attention import SMALLEST_SIZE, size_bias
from .fusing import fuse_tokens, fused_source_map, split_by_score
from .matching import Matching, bipartite_soft_matching, cosine_scores, split_counts
from .merging import compose_source_maps, merge_tokens, source_map, unmerge_tokens
from .relaxation import move_mass, permute_tokens, size_order, soft_assignment, soft_grouping, soft_merging


__all__ = [
    "SMALLEST_SIZE",
    "Matching",
    "bipartite_soft_matching",
    "compose_source_maps",
    "cosine_scores",
    "fuse_tokens",
    "fused_source_map",
    "merge_tokens",
    "move_mass",
    "permute_tokens",
    "size_bias",
    "size_order",
    "soft_assignment",
    "soft_grouping",
    "soft_merging",
    "source_map",
    "split_by_score",
    "split_counts",
    "unmerge_tokens",
]
