"""Keeping some tokens and fusing the others, against loops over tokens."""

from __future__ import annotations

import pytest
import torch

from dtem_hf import ops


def by_hand(scores: list[float], num_kept: int, prefix: int) -> tuple[list[int], list[int]]:
    """Who stays and who is fused, for one image."""
    ranked = sorted(range(prefix, len(scores)), key=lambda position: (-scores[position], position))
    return sorted(ranked[:num_kept]), sorted(ranked[num_kept:])


@pytest.mark.parametrize("prefix", [1, 2, 5])
@pytest.mark.parametrize("levels", [3, 10_000], ids=["ties", "no ties"])
def test_the_highest_scores_stay_in_their_order(prefix: int, levels: int) -> None:
    """Equal scores go to the lower position; the scores of prefix tokens do not count."""
    scores = torch.randint(levels, (4, 17)).float()
    scores[:, :prefix] += levels * torch.randint(-1, 2, (4, prefix))
    for num_kept in range(17 - prefix + 1):
        kept, fused = ops.split_by_score(scores, num_kept, prefix)
        for image in range(4):
            expected = by_hand(scores[image].tolist(), num_kept, prefix)
            assert (kept[image].tolist(), fused[image].tolist()) == expected


@pytest.mark.parametrize("prefix", [1, 2, 5])
@pytest.mark.parametrize("num_kept", [0, 1, 6, 11])
def test_fusing_equals_loops(prefix: int, num_kept: int) -> None:
    x, weights = torch.randn(3, 17, 5), torch.rand(3, 17)
    sizes = torch.randint(1, 9, (3, 17)).float()
    kept, fused = ops.split_by_score(torch.randn(3, 17), num_kept, prefix)
    ours, new_sizes = ops.fuse_tokens(x, sizes, weights, kept, fused, prefix)
    source = ops.fused_source_map(kept, 17, prefix)
    assert ours.shape == (3, prefix + num_kept + 1, 5)
    assert (new_sizes.dtype, source.dtype) == (torch.float32, torch.int64)
    for image in range(3):
        staying = [*range(prefix), *kept[image].tolist()]
        leaving = [position for position in range(17) if position not in staying]
        assert torch.equal(ours[image, :-1], x[image, staying])
        assert torch.equal(new_sizes[image, :-1], sizes[image, staying])
        token = sum(weights[image, position].double() * x[image, position].double() for position in leaving)
        torch.testing.assert_close(ours[image, -1].double(), token, atol=1e-6, rtol=1e-6)
        assert new_sizes[image, -1] == sum(sizes[image, position] for position in leaving)
        expected = [staying.index(position) if position in staying else len(staying) for position in range(17)]
        assert source[image].tolist() == expected
    assert torch.equal(new_sizes.sum(dim=1), sizes.sum(dim=1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_sum_of_many_tokens_runs_in_float32(dtype: torch.dtype, autocast: bool) -> None:
    """300 tokens of 3 with weight 1 are 900, where a running sum in bfloat16 stands still at 512 or 768."""
    x = torch.full((1, 301, 4), 3.0, dtype=dtype)
    kept, fused = ops.split_by_score(torch.rand(1, 301), 0)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        ours, sizes = ops.fuse_tokens(x, torch.ones(1, 301), torch.ones(1, 301), kept, fused)
    assert ours.dtype == dtype
    assert ours[0, -1].tolist() == [torch.tensor(900.0, dtype=dtype).item()] * 4
    assert sizes.tolist() == [[1.0, 300.0]]


def test_gradients_reach_tokens_and_weights() -> None:
    x = torch.randn(2, 9, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(2, 9, dtype=torch.float64, requires_grad=True)
    kept, fused = ops.split_by_score(torch.randn(2, 9), 3)
    ours, _ = ops.fuse_tokens(x, torch.ones(2, 9), weights, kept, fused)
    upstream = torch.randn_like(ours)
    grad_x, grad_weights = torch.autograd.grad((ours * upstream).sum(), (x, weights))
    for image in range(2):
        staying = [0, *kept[image].tolist()]
        for position in range(9):
            if position in staying:
                assert torch.equal(grad_x[image, position], upstream[image, staying.index(position)])
                assert grad_weights[image, position] == 0
            else:
                last = upstream[image, -1]
                expected = weights[image, position] * last, x[image, position] @ last
                torch.testing.assert_close(grad_x[image, position], expected[0], atol=1e-6, rtol=1e-6)
                torch.testing.assert_close(grad_weights[image, position], expected[1], atol=1e-6, rtol=1e-6)
