"""The compiled path of matching and merging, against the plain one and a slow loop; and when it stands aside."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dtem_hf import ops
from dtem_hf.ops import native


compiled = pytest.mark.skipif(native.library() is None, reason="needs a C compiler")


def plain(x: Tensor, sizes: Tensor | None, metric: Tensor, r: int, prefix: int, heads: int = 1) -> tuple[Tensor, ...]:
    matching = ops.bipartite_soft_matching(ops.add_heads(metric, heads), r, prefix)
    return (*ops.merge_tokens(x, sizes, matching), *matching[:3])


def flat(result: ops.Merged) -> tuple[Tensor, ...]:
    return (result.x, result.sizes, *result.matching()[:3])


@compiled
@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("num_tokens, r", [(40, 1), (41, 17), (197, 16), (198, 96), (12, 3), (77, 36)])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("sized", [True, False])
def test_equals_the_plain_path(prefix: int, num_tokens: int, r: int, heads: int, sized: bool) -> None:
    r = min(r, (num_tokens - prefix) // 2)
    x, metric = torch.randn(3, num_tokens, 50), torch.randn(3, num_tokens, heads * 20)
    sizes = torch.randint(1, 9, (3, num_tokens)).float() if sized else None
    found = flat(native.match_and_merge(x, sizes, metric, heads, r, prefix))
    expected = plain(x, sizes, metric, r, prefix, heads)
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        assert torch.equal(ours, theirs)  # sizes and indices
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-5)
    bias = native.match_and_merge(x, sizes, metric, heads, r, prefix).bias
    torch.testing.assert_close(bias, ops.size_bias(expected[1], torch.float32), atol=1e-6, rtol=1e-6)


@compiled
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_ties_go_to_the_lower_position_whatever_the_batch(prefix: int) -> None:
    """Seven different tokens, repeated: every score is there many times, and all of them at odd places of vectors."""
    kinds = torch.randn(7, 33)
    metric = kinds[torch.randint(7, (5, 61))]
    x = torch.randn(5, 61, 8)
    found = flat(native.match_and_merge(x, None, metric, 1, 25, prefix))
    for image in range(5):
        alone = flat(native.match_and_merge(x[image : image + 1], None, metric[image : image + 1], 1, 25, prefix))
        assert all(torch.equal(a[0], b[image]) for a, b in zip(alone, found, strict=True))
        merged, target, kept = (indices[image].tolist() for indices in found[2:])
        # By exact equality of tokens: a B token of the same kind scores 1, and the first of them wins.
        first_a, first_b = prefix + prefix % 2, prefix + 1 - prefix % 2
        a, b = metric[image, first_a::2], metric[image, first_b::2]
        for row, column in zip(merged, target, strict=True):
            same = (b == a[row]).all(dim=1).nonzero().flatten().tolist()
            assert not same or column == same[0]
        exact = [i for i in range(len(a)) if (b == a[i]).all(dim=1).any()]
        assert sorted(merged[: len(exact)]) == sorted(exact)[: len(merged)] or len(exact) > len(merged)
        assert kept == sorted(set(range(len(a))) - set(merged))


@compiled
def test_reads_strided_and_expanded_tensors() -> None:
    wide, many = torch.randn(2, 40, 90), torch.randn(2, 80, 24)
    x, metric, sizes = wide[..., 10:70], many[:, ::2, 4:20], torch.ones(1, 40).expand(2, -1)
    found = flat(native.match_and_merge(x, sizes, metric, 1, 11, 1))
    expected = plain(x, sizes, metric, 11, 1)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


@compiled
def test_bias_of_tokens_that_hardly_count_and_no_images() -> None:
    sizes = torch.tensor([1, 3, 0, 1e-9, 1e-7, 2, 1, 1]).repeat(1, 3)
    _, summed, _, bias = native.match_and_merge(torch.randn(1, 24, 4), sizes, torch.randn(1, 24, 8), 1, 2, 1)
    assert bias is not None and summed.min() == 0
    torch.testing.assert_close(bias, ops.size_bias(summed, torch.float32), atol=1e-6, rtol=1e-6)
    empty = ops.match_and_merge(torch.randn(0, 20, 8), None, torch.randn(0, 20, 8), 4)
    assert [tuple(t.shape) for t in flat(empty)] == [(0, 16, 8), (0, 16), (0, 4), (0, 4), (0, 5)]


@compiled
def test_tokens_nobody_joined_are_copied_bit_for_bit() -> None:
    x, metric = torch.randn(1, 50, 32), torch.randn(1, 50, 16)
    out, sizes, make, _ = native.match_and_merge(x, None, metric, 1, 12, 1)
    matching = make()
    alone = (sizes[0] == 1).nonzero().flatten()
    kept = matching.kept[0] * 2 + 2
    origin = torch.cat([torch.zeros(1, dtype=torch.int64), kept, torch.arange(1, 50, 2)])
    assert torch.equal(out[0, alone], x[0, origin[alone]])


@compiled
def test_a_metric_that_is_not_finite_or_zero_neither_crashes_nor_loses_tokens() -> None:
    metric = torch.randn(1, 30, 8)
    metric[0, 4], metric[0, 7], metric[0, 9] = torch.nan, torch.inf, 0
    x = torch.randn(1, 30, 4)
    _, sizes, make, _ = native.match_and_merge(x, None, metric, 1, 10, 1)
    matching = make()
    assert sizes.sum() == 30
    assert sorted(torch.cat([matching.merged, matching.kept], dim=1)[0].tolist()) == list(range(14))


def both(x: Tensor, metric: Tensor) -> bool:
    return native.can_match_and_merge(x, None, metric)


def _assert_not(value: bool) -> None:
    assert not value


@compiled
def test_stands_aside_where_it_is_not_exact_not_seen_or_slower() -> None:
    x, metric = torch.randn(1, 20, 8), torch.randn(1, 20, 4)
    assert both(x, metric)
    assert not both(x.bfloat16(), metric) and not both(x.double(), metric.double())
    assert not both(x.clone().requires_grad_(), metric)
    with torch.no_grad():
        assert both(x.clone().requires_grad_(), metric)
    assert not both(x.transpose(1, 2).contiguous().transpose(1, 2), metric)
    assert not both(torch.randn(500, 20, 8), torch.randn(500, 20, 4))
    assert not native.can_match_and_merge(x, torch.ones(1, 20, dtype=torch.float64), metric)
    with FlopCounterMode(display=False) as counter:
        assert not both(x, metric)
        ops.match_and_merge(x, None, metric, 5)
    assert counter.get_total_flops() == 2 * 9 * 10 * 4  # one product of A and B
    torch.func.vmap(lambda x, metric: _assert_not(both(x, metric)) or x)(x[None], metric[None])
    traced = torch.jit.trace(lambda x, metric: ops.match_and_merge(x, None, metric, 5)[0], (x, metric))
    other = torch.randn(1, 20, 8), torch.randn(1, 20, 4)
    torch.testing.assert_close(traced(*other), plain(other[0], None, other[1], 5, 1)[0])


@compiled
def test_dispatch_takes_it_and_gives_what_the_plain_path_gives() -> None:
    x, metric = torch.randn(2, 60, 16), torch.randn(2, 60, 24)
    for tensors in zip(
        flat(ops.match_and_merge(x, None, metric, 20, heads=3)), plain(x, None, metric, 20, 1, 3), strict=True
    ):
        torch.testing.assert_close(*tensors, atol=1e-6, rtol=1e-6)
