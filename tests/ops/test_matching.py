"""Bipartite soft matching against loops over pairs, one image at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dtem_hf import ops
from tests.support import slow_reference as slow


def pairs_of(matching: ops.Matching, image: int) -> list[tuple[int, int]]:
    """A matching as (position that leaves, position that it joins) over the whole sequence."""
    partners = matching.staying[image][matching.joined[image]]
    return list(zip(matching.leaving[image].tolist(), partners.tolist(), strict=True))


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("num_tokens", [16, 17])
def test_pairs_equal_the_slow_reference_for_every_r(prefix: int, num_tokens: int) -> None:
    metric = torch.randn(3, num_tokens, 6)
    for r in range((num_tokens - prefix) // 2 + 1):
        matching = ops.bipartite_soft_matching(metric, r, prefix)
        for image in range(3):
            assert pairs_of(matching, image) == slow.hard_matching(metric[image], r, prefix)


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("num_tokens", [16, 17])
def test_tokens_leave_a_or_stay_in_order(prefix: int, num_tokens: int) -> None:
    metric = torch.randn(2, num_tokens, 6)
    even, odd = ([i for i in range(prefix, num_tokens) if i % 2 == parity] for parity in (0, 1))
    for r in range((num_tokens - prefix) // 2 + 1):
        matching = ops.bipartite_soft_matching(metric, r, prefix)
        assert matching.leaving.shape == matching.joined.shape == (2, r)
        for leaving, staying in zip(matching.leaving.tolist(), matching.staying.tolist(), strict=True):
            assert set(leaving) <= set(even)
            assert staying == [*range(prefix), *(i for i in even if i not in leaving), *odd]


@pytest.mark.parametrize(
    "prefix, free", [(0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (5, 0), (5, 1)]
)
def test_r_zero_fits_any_number_of_tokens(prefix: int, free: int) -> None:
    """Also where one half, or both, are empty."""
    matching = ops.bipartite_soft_matching(torch.randn(2, prefix + free, 4), 0, prefix)
    assert matching.leaving.shape == matching.joined.shape == (2, 0)
    free_tokens = sorted(range(prefix, prefix + free), key=lambda i: i % 2)
    assert matching.staying.tolist() == [[*range(prefix), *free_tokens]] * 2


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_split_counts_and_halves_cut_at_even_and_odd_positions(prefix: int) -> None:
    for num_tokens in range(prefix, prefix + 8):
        positions = torch.arange(num_tokens).unsqueeze(0)
        a, b = ops.matching.split_even_odd(positions, prefix)
        assert a.tolist() == [[i for i in range(prefix, num_tokens) if i % 2 == 0]]
        assert b.tolist() == [[i for i in range(prefix, num_tokens) if i % 2 == 1]]
        assert ops.splitting.split_counts(num_tokens, prefix) == (a.shape[1], b.shape[1])


@pytest.mark.parametrize("r", [-1, 9])
def test_r_that_does_not_fit_is_refused_with_the_range_that_would(r: int) -> None:
    with pytest.raises(ValueError, match=rf"r={r} .*17 tokens.* 1 are prefix: 0 to 8"):
        ops.bipartite_soft_matching(torch.randn(1, 17, 4), r, 1)


def repeated_axes(batch: int, num_tokens: int) -> Tensor:
    """Tokens that are copies of four unit vectors: every score is exactly 0 or 1, and almost all are ties."""
    generator = torch.Generator().manual_seed(3)
    return torch.eye(4)[torch.randint(4, (batch, num_tokens), generator=generator)]


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("num_tokens", [20, 21])
def test_ties_go_to_the_lower_position(prefix: int, num_tokens: int) -> None:
    metric = repeated_axes(8, num_tokens)
    for r in range((num_tokens - prefix) // 2 + 1):
        matching = ops.bipartite_soft_matching(metric, r, prefix)
        for image in range(8):
            assert pairs_of(matching, image) == slow.hard_matching(metric[image], r, prefix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_tokens_equal_merges_the_first_r_into_the_first(dtype: torch.dtype) -> None:
    metric = torch.randn(64, dtype=dtype).expand(2, 197, 64)
    matching = ops.bipartite_soft_matching(metric, 20, 1)
    assert [pairs_of(matching, image) for image in (0, 1)] == [[(2 * i, 1) for i in range(1, 21)]] * 2


@pytest.mark.parametrize("num_tokens, width", [(197, 64), (65, 8), (50, 24)])
def test_ties_of_duplicated_tokens_do_not_depend_on_the_batch(num_tokens: int, width: int) -> None:
    """64 images in one batch and one by one: the same matching, bit for bit."""
    distinct = torch.randn(64, num_tokens // 4, width)
    metric = distinct.gather(
        1, torch.randint(num_tokens // 4, (64, num_tokens))[..., None].expand(-1, -1, width)
    ).contiguous()
    together = ops.bipartite_soft_matching(metric, num_tokens // 4, 1)
    for image in range(64):
        alone = ops.bipartite_soft_matching(metric[image : image + 1], num_tokens // 4, 1)
        for ours, theirs in zip(alone[:3], together[:3], strict=True):
            assert torch.equal(ours[0], theirs[image])


def test_cosine_scores_are_float32_and_bounded_also_under_autocast() -> None:
    a, b = torch.randn(2, 5, 16).bfloat16() * 1e4, torch.randn(2, 7, 16).bfloat16() * 1e-4
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = ops.cosine_scores(a, b)
    assert scores.dtype == torch.float32
    for image in range(2):
        for i in range(5):
            for j in range(7):
                expected = slow.cosine(a[image, i].double(), b[image, j].double()).item()
                assert abs(scores[image, i, j].item() - expected) < 1e-6


def test_zero_metric_rows_stay_finite() -> None:
    """A token whose embedding is exactly 0 has no direction: its scores are 0, not NaN."""
    metric = torch.randn(1, 9, 4)
    metric[0, [2, 3]] = 0
    a, b = ops.matching.split_even_odd(metric, 1)
    scores = ops.cosine_scores(a, b)
    assert scores.isfinite().all()
    assert not scores[0, 0].any()


@pytest.mark.parametrize("r", [16, 98])
def test_source_map_equals_the_authors(oracle: dict[str, Tensor], r: int) -> None:
    matching = ops.bipartite_soft_matching(oracle["metric"], r, 1)
    assert torch.equal(ops.source_map(matching, 197), oracle[f"hard_r{r}_source"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_matches_as_the_cpu_does() -> None:
    metric = repeated_axes(8, 65)
    expected = ops.bipartite_soft_matching(metric, 16, 1)
    matching = ops.bipartite_soft_matching(metric.cuda(), 16, 1)
    for ours, theirs in zip(matching[:3], expected[:3], strict=True):
        assert torch.equal(ours.cpu(), theirs)
