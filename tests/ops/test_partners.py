"""Tokens that join others anywhere in a sequence, against loops over tokens, one image at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dtem_hf import ops
from tests.support import slow_reference as slow


def merged_by_energy(x: Tensor, sizes: Tensor, metric: Tensor, r: int, margin: float, prefix: int) -> tuple:
    hosts = ops.match_by_energy(metric, r, margin, prefix, sizes <= 0 if (sizes <= 0).any() else None)
    return *ops.merge_tokens(x, sizes, hosts), ops.source_map(hosts, x.shape[1])


def squeezed(x: Tensor, sizes: Tensor, scores: Tensor, num_kept: int, prefix: int) -> tuple:
    empty = sizes <= 0
    kept, pruned = ops.split_by_score(scores.masked_fill(empty, -torch.inf), num_kept, prefix)
    hosts, weights = ops.match_pruned_to_kept(x, kept, pruned, empty if empty.any() else None)
    return (
        ops.merge_tokens(x, weights, hosts)[0],
        ops.merge_tokens(sizes.unsqueeze(-1), sizes, hosts)[1],
        ops.source_map(hosts, x.shape[1]),
    )


def assert_same(ours: tuple, image: int, theirs: slow.Joined, real: Tensor) -> None:
    """What padding says counts for nothing, nor does where it goes."""
    x, sizes, source = (part[image] for part in ours)
    rows, new_sizes, new_source = theirs
    torch.testing.assert_close(sizes, new_sizes, atol=0, rtol=0)
    torch.testing.assert_close(x[sizes > 0], rows[new_sizes > 0], atol=1e-6, rtol=1e-6)
    assert source[real].tolist() == [place for place, counts in zip(new_source, real, strict=True) if counts]


def drawn(prefix: int, padding: int) -> tuple[Tensor, Tensor, Tensor]:
    x, metric = torch.randn(3, 17 + prefix, 5), torch.randn(3, 17 + prefix, 6)
    sizes = torch.randint(1, 9, (3, 17 + prefix)).float()
    for image in range(3):
        sizes[image, prefix + torch.randperm(17)[:padding]] = 0
    return x, metric, sizes


@pytest.mark.parametrize("margin", [0.9, 0.1, -0.5])
@pytest.mark.parametrize("padding", [0, 5, 11])
@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_merging_by_energy_equals_loops_for_every_r(prefix: int, padding: int, margin: float) -> None:
    x, metric, sizes = drawn(prefix, padding)
    for r in range(1, 17 // 2 + 1):
        ours = merged_by_energy(x, sizes, metric, r, margin, prefix)
        for image in range(3):
            theirs = slow.merge_by_energy(x[image], sizes[image], metric[image], prefix, r, margin)
            assert_same(ours, image, theirs, sizes[image] > 0)
    assert torch.equal(ours[0][:, :prefix], x[:, :prefix])


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_squeezing_equals_loops_for_every_number_of_kept_tokens(prefix: int, padding: int) -> None:
    x, scores, sizes = drawn(prefix, padding)
    for num_kept in range(1, 18):
        ours = squeezed(x, sizes, scores[..., 0], num_kept, prefix)
        for image in range(3):
            theirs = slow.squeeze(x[image], sizes[image], scores[image, :, 0], prefix, num_kept)
            assert_same(ours, image, theirs, sizes[image] > 0)


def test_energy_by_hand() -> None:
    """Of two equal tokens and a third at a right angle: cosines 1, 1, 0 and 0, 0, 1."""
    cosines = ops.cosine_scores(torch.tensor([[[2.0, 0], [3, 0], [0, 1]]]), torch.tensor([[[2.0, 0], [3, 0], [0, 1]]]))
    alike, alone = 2 * 0.1 + math.exp(-0.9) - 1, 0.1 + 2 * (math.exp(-0.9) - 1)
    expected = torch.tensor([[alike, alike, alone]]) / 3
    torch.testing.assert_close(ops.partners.energies(cosines, 0.9), expected, atol=1e-6, rtol=0)


def test_equal_energies_go_to_the_lower_position_and_equal_partners_to_the_first() -> None:
    metric = torch.ones(2, 9, 4)
    hosts = ops.match_by_energy(metric, 2, 0.5)
    assert hosts.leaving.tolist() == [[1, 3]] * 2
    assert ops.source_map(hosts, 9).tolist() == [[0, 1, 1, 1, 2, 3, 4, 5, 6]] * 2


@pytest.mark.parametrize("r", [0, 5])
def test_an_r_that_does_not_fit_is_refused(r: int) -> None:
    with pytest.raises(ValueError, match=f"r={r} does not fit 9 tokens beside the prefix: 1 to 4 would"):
        ops.match_by_energy(torch.randn(1, 10, 4), r, 0.5)


def test_a_token_that_nothing_joins_is_copied_bit_for_bit() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 12, 5).to(dtype)
        hosts = ops.partners.matching_of_pairs(torch.tensor([[3, 7], [11, 2]]), torch.tensor([[4, 4], [1, 5]]), 12)
        merged, sizes = ops.merge_tokens(x, torch.ones(2, 12), hosts)
        assert merged.dtype == dtype and sizes.dtype == torch.float32
        for image in range(2):
            alone = sizes[image] == 1
            assert torch.equal(merged[image, alone], x[image, hosts.staying[image, alone]])
        assert sizes.sum(dim=1).tolist() == [12, 12]


def test_gradients_of_squeezing_equal_those_of_loops() -> None:
    """The weights depend on the tokens as well."""
    x = torch.randn(1, 9, 4, requires_grad=True)
    sizes, scores = torch.ones(1, 9), torch.rand(1, 9)
    slope = torch.randn(1, 5, 4)
    (squeezed(x, sizes, scores, 4, 1)[0] * slope).sum().backward()
    other = x.detach().double().clone().requires_grad_()
    (slow.squeeze(other[0], sizes[0], scores[0], 1, 4)[0] * slope[0]).sum().backward()
    torch.testing.assert_close(x.grad.double(), other.grad, atol=1e-5, rtol=1e-5)
