"""Merging along a matching, and source maps, against loops over tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dtem_hf import ops
from tests.support import slow_reference as slow


def integers(*shape: int) -> Tensor:
    """Sizes as they occur after earlier merges."""
    return torch.randint(1, 9, shape).float()


@pytest.mark.parametrize("with_sizes", [False, True], ids=["ones", "sizes"])
@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("num_tokens", [16, 17])
def test_merge_equals_the_slow_reference_for_every_r(prefix: int, num_tokens: int, with_sizes: bool) -> None:
    x, metric = torch.randn(2, num_tokens, 5), torch.randn(2, num_tokens, 6)
    sizes = integers(2, num_tokens) if with_sizes else None
    for r in range((num_tokens - prefix) // 2 + 1):
        matching = ops.bipartite_soft_matching(metric, r, prefix)
        merged, new_sizes = ops.merge_tokens(x, sizes, matching)
        source = ops.source_map(matching, num_tokens)
        assert merged.shape == (2, num_tokens - r, 5)
        assert source.dtype == torch.int64
        for image in range(2):
            before = torch.ones(num_tokens) if sizes is None else sizes[image]
            pairs = slow.hard_matching(metric[image], r, prefix)
            expected_x, expected_sizes, expected_source, alone = slow.hard_merge(x[image], before, pairs, prefix)
            torch.testing.assert_close(merged[image].double(), expected_x, atol=1e-6, rtol=1e-6)
            assert torch.equal(new_sizes[image].double(), expected_sizes)
            assert source[image].tolist() == expected_source
            for output, position in alone.items():
                assert torch.equal(merged[image, output], x[image, position])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tokens_without_a_partner_are_copied_bit_for_bit(dtype: torch.dtype) -> None:
    x = torch.randn(2, 33, 8).to(dtype)
    sizes = integers(2, 33) / 3  # not representable: x · m / m would round
    matching = ops.bipartite_soft_matching(torch.randn(2, 33, 6), 5, 1)
    merged, new_sizes = ops.merge_tokens(x, sizes, matching)
    source = ops.source_map(matching, 33)
    copied = 0
    for image in range(2):
        for output in range(28):
            inputs = (source[image] == output).nonzero().flatten().tolist()
            if len(inputs) == 1:
                assert torch.equal(merged[image, output], x[image, inputs[0]])
                assert new_sizes[image, output] == sizes[image, inputs[0]]
                copied += 1
    assert copied >= 2 * (33 - 2 * 5)
    assert merged.dtype == dtype
    assert new_sizes.dtype == torch.float32


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_total_size_and_weighted_sum_of_features_are_conserved(prefix: int) -> None:
    x, sizes = torch.randn(4, 41, 7), integers(4, 41)
    matching = ops.bipartite_soft_matching(torch.randn(4, 41, 6), 17, prefix)
    merged, new_sizes = ops.merge_tokens(x, sizes, matching)
    assert torch.equal(new_sizes.sum(1), sizes.sum(1))
    before = (sizes.double().unsqueeze(-1) * x.double()).sum(1)
    after = (new_sizes.double().unsqueeze(-1) * merged.double()).sum(1)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=0)


def test_low_precision_features_are_summed_in_float32() -> None:
    """200 equal bfloat16 tokens merge to themselves; a bfloat16 sum of sizes would stop counting at 256."""
    x = torch.full((1, 401, 2), 1.0078125, dtype=torch.bfloat16)
    matching = ops.bipartite_soft_matching(torch.ones(1, 401, 4), 200, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        merged, sizes = ops.merge_tokens(x, torch.full((1, 401), 3.0), matching)
    assert sizes[0].max() == 603
    assert torch.equal(merged, x[:, :201])


def test_merge_is_differentiable_as_the_slow_reference_is() -> None:
    x, sizes = torch.randn(1, 17, 5, requires_grad=True), integers(1, 17).requires_grad_()
    metric, upstream = torch.randn(1, 17, 6), torch.randn(11, 5)
    matching = ops.bipartite_soft_matching(metric, 6, 1)
    merged, new_sizes = ops.merge_tokens(x, sizes, matching)
    ours = torch.autograd.grad((merged[0] * upstream).sum() + new_sizes.square().sum(), (x, sizes))
    pairs = slow.hard_matching(metric[0], 6, 1)
    expected_x, expected_sizes, _, _ = slow.hard_merge(x[0], sizes[0], pairs, 1)
    theirs = torch.autograd.grad((expected_x * upstream).sum() + expected_sizes.square().sum(), (x, sizes))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_merge_of_empty_tokens_is_finite_with_gradients() -> None:
    """Soft merging leaves sizes of exactly 0; a hard merge behind it meets some that no token joins."""
    x, sizes = torch.randn(1, 17, 5), torch.ones(1, 17)
    sizes[:, 2:12] = 0
    x, sizes = x.requires_grad_(), sizes.requires_grad_()
    matching = ops.bipartite_soft_matching(torch.randn(1, 17, 6), 5, 1)
    merged, new_sizes = ops.merge_tokens(x, sizes, matching)
    gradients = torch.autograd.grad(merged.square().sum() + new_sizes.square().sum(), (x, sizes))
    assert all(t.isfinite().all() for t in (merged, new_sizes, *gradients))


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_source_map_counts_are_the_sizes(prefix: int) -> None:
    matching = ops.bipartite_soft_matching(torch.randn(3, 30, 6), 11, prefix)
    _, sizes = ops.merge_tokens(torch.randn(3, 30, 2), None, matching)
    source = ops.source_map(matching, 30)
    for image in range(3):
        assert source[image].bincount(minlength=19).tolist() == sizes[image].tolist()


def test_compose_follows_two_merges_in_a_row() -> None:
    """Merging ones twice, every input's token stands for as many inputs as point at it through both maps."""
    sizes, composed = None, torch.arange(40).expand(2, -1)
    x = torch.randn(2, 40, 3)
    expected = [[[i] for i in range(40)] for _ in range(2)]
    for r in (13, 9, 4):
        num_tokens = x.shape[1]
        matching = ops.bipartite_soft_matching(x, r, 1)
        step = ops.source_map(matching, num_tokens)
        for image in range(2):
            groups: list[list[int]] = [[] for _ in range(num_tokens - r)]
            for i, members in enumerate(expected[image]):
                groups[step[image, i]] += members
            expected[image] = groups
        x, sizes = ops.merge_tokens(x, sizes, matching)
        composed = ops.compose_source_maps(composed, step)
    for image in range(2):
        for position, members in enumerate(expected[image]):
            assert (composed[image] == position).nonzero().flatten().tolist() == sorted(members)
            assert sizes[image, position] == len(members)


def test_unmerge_gives_every_input_its_own_token() -> None:
    x = torch.randn(2, 20, 3)
    matching = ops.bipartite_soft_matching(torch.randn(2, 20, 6), 7, 1)
    merged, _ = ops.merge_tokens(x, None, matching)
    source = ops.source_map(matching, 20)
    back = ops.unmerge_tokens(merged, source)
    assert back.shape == x.shape
    for image in range(2):
        for i in range(20):
            assert torch.equal(back[image, i], merged[image, source[image, i]])
    torch.testing.assert_close(back.sum(1), x.sum(1), atol=1e-5, rtol=0)  # group means keep the sum


@pytest.mark.parametrize("name, r, prefix", [("hard_r16", 16, 1), ("hard_r98", 98, 1), ("hard_distill_r16", 16, 2)])
def test_merged_tokens_equal_the_authors(oracle: dict[str, Tensor], name: str, r: int, prefix: int) -> None:
    matching = ops.bipartite_soft_matching(oracle["metric"], r, prefix)
    x, sizes = ops.merge_tokens(oracle["x"], oracle["size"], matching)
    torch.testing.assert_close(x, oracle[f"{name}_x"], atol=1e-4, rtol=0)
    torch.testing.assert_close(sizes, oracle[f"{name}_size"], atol=1e-4, rtol=0)


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device: there, sums go through a one-hot product"
)
def test_cuda_equals_the_scatter_of_the_cpu_and_is_repeatable() -> None:
    x, sizes, metric = torch.randn(4, 197, 192), integers(4, 197), torch.randn(4, 197, 64)
    matching = ops.bipartite_soft_matching(metric, 40, 1)
    expected, expected_sizes = ops.merge_tokens(x, sizes, matching)
    on_cuda = ops.Matching(*(index.cuda() for index in matching))
    merged, new_sizes = ops.merge_tokens(x.cuda(), sizes.cuda(), on_cuda)
    again, _ = ops.merge_tokens(x.cuda(), sizes.cuda(), on_cuda)
    assert torch.equal(new_sizes.cpu(), expected_sizes)
    torch.testing.assert_close(merged.cpu(), expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(merged, again)
