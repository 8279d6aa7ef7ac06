"""Pure tensor functions of token merging: no module, no state, no transformers import."""

from .attention import BIAS_FORMS, SMALLEST_SIZE, biased_attention, extend_keys, size_bias
from .damage import first_order_change
from .forms import MERGE_FORMS, exports_one_hot, merge_form
from .fusing import fuse_tokens, fused_source_map, split_by_score
from .matching import Matching, bipartite_soft_matching, cosine_scores, put_empty_first, split_counts, split_even_odd
from .merging import Merged, compose_source_maps, merge_tokens, source_map, unmerge_tokens
from .reduction import add_heads, match_and_merge
from .relaxation import (
    merge_along_flow,
    move_mass,
    permute_tokens,
    size_order,
    soft_assignment,
    soft_grouping,
    soft_merging,
    straight_through_matching,
)


__all__ = [
    "BIAS_FORMS",
    "MERGE_FORMS",
    "SMALLEST_SIZE",
    "Matching",
    "Merged",
    "add_heads",
    "biased_attention",
    "bipartite_soft_matching",
    "compose_source_maps",
    "cosine_scores",
    "exports_one_hot",
    "extend_keys",
    "first_order_change",
    "fuse_tokens",
    "fused_source_map",
    "match_and_merge",
    "merge_along_flow",
    "merge_form",
    "merge_tokens",
    "move_mass",
    "permute_tokens",
    "put_empty_first",
    "size_bias",
    "size_order",
    "soft_assignment",
    "soft_grouping",
    "soft_merging",
    "source_map",
    "split_by_score",
    "split_counts",
    "split_even_odd",
    "straight_through_matching",
    "unmerge_tokens",
]
