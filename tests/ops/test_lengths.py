"""ToFu's two ways to reduce tokens, against loops over tokens."""

from __future__ import annotations

import pytest
import torch

from dtem_hf import ops
from tests.support import slow_reference as slow


@pytest.mark.parametrize("prune", [True, False], ids=["prune", "merge"])
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_tofu_equals_loops_for_every_r(prefix: int, prune: bool) -> None:
    x, metric = torch.randn(3, 17, 5), torch.randn(3, 17, 6)
    sizes = torch.randint(1, 9, (3, 17)).float()
    for r in range(1, (17 - prefix) // 2 + 1):
        matching = ops.bipartite_soft_matching(metric, r, prefix)
        if prune:
            ours, new_sizes = ops.prune_tokens(x, sizes, matching)
        else:
            ours, new_sizes = ops.merge_tokens(x, sizes, matching)
            ours = ops.restore_lengths(ours, x, ops.source_map(matching, 17))
        for image in range(3):
            rows, slow_sizes, _ = slow.fuse_pairs(x[image], sizes[image], metric[image], prefix, r, prune)
            torch.testing.assert_close(ours[image].double(), rows.double(), atol=1e-5, rtol=1e-5)
            assert new_sizes[image].tolist() == slow_sizes.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_that_none_joins_stay_bit_for_bit_and_so_do_all_that_prune(dtype: torch.dtype) -> None:
    x, metric = torch.randn(2, 14, 5).to(dtype), torch.randn(2, 14, 6)
    sizes, matching = torch.ones(2, 14), ops.bipartite_soft_matching(metric, 4, 1)
    source = ops.source_map(matching, 14)
    merged, _ = ops.merge_tokens(x, sizes, matching)
    longer, pruned = ops.restore_lengths(merged, x, source), ops.prune_tokens(x, sizes, matching)[0]
    for image in range(2):
        for place in range(10):
            members = [i for i in range(14) if source[image, i] == place]
            if len(members) == 1:
                assert torch.equal(longer[image, place], x[image, members[0]])
            host = next(i for i in members if i not in matching.leaving[image].tolist())
            assert torch.equal(pruned[image, place], x[image, host])
    assert longer.dtype == pruned.dtype == dtype


def test_a_mean_of_opposite_tokens_stays_zero_and_padding_has_no_length() -> None:
    x = torch.tensor([[[3.0, 0.0], [-3.0, 0.0], [0.0, 50.0], [0.0, 2.0]]])
    source = torch.tensor([[0, 0, 1, 1]])
    merged = torch.tensor([[[0.0, 0.0], [0.0, 1.0]]])
    empty = torch.tensor([[False, False, True, False]])
    assert ops.restore_lengths(merged, x, source, empty).tolist() == [[[0.0, 0.0], [0.0, 2.0]]]
