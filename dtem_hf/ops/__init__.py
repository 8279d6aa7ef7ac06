"""Pure tensor functions of token merging: no module, no state, no transformers import."""

from .attention import attention_dtype, extend_keys, see_itself, size_bias
from .first_order import first_order_change
from .forms import exports, is_exporting, merge_form
from .fusing import fuse_tokens, fused_source_map, split_by_score
from .lengths import norms_of, prune_tokens, restore_lengths
from .masking import draw_kept, squeeze_in_place
from .matching import Matching, bipartite_soft_matching, cosine_scores, put_empty_first
from .merging import compose_source_maps, join_in_place, merge_tokens, source_map, unmerge_tokens
from .partners import match_by_energy, match_pruned_to_kept
from .relaxation import (
    merge_along_flow,
    move_mass,
    permute_tokens,
    size_order,
    soft_assignment,
    soft_grouping,
    straight_through_matching,
)
from .splitting import split_even_odd


__all__ = [
    "Matching",
    "attention_dtype",
    "bipartite_soft_matching",
    "compose_source_maps",
    "cosine_scores",
    "draw_kept",
    "exports",
    "extend_keys",
    "first_order_change",
    "fuse_tokens",
    "fused_source_map",
    "is_exporting",
    "join_in_place",
    "match_by_energy",
    "match_pruned_to_kept",
    "merge_along_flow",
    "merge_form",
    "merge_tokens",
    "move_mass",
    "norms_of",
    "permute_tokens",
    "prune_tokens",
    "put_empty_first",
    "restore_lengths",
    "see_itself",
    "size_bias",
    "size_order",
    "soft_assignment",
    "soft_grouping",
    "source_map",
    "split_by_score",
    "split_even_odd",
    "squeeze_in_place",
    "straight_through_matching",
    "unmerge_tokens",
]
