"""Straight-through merging: forward it is the hard merge, backward it has the soft grouping's gradients."""

import pytest
import torch

from dtem_hf.ops import (
    bipartite_soft_matching,
    merge_along_flow,
    merge_tokens,
    soft_grouping,
    straight_through_matching,
)


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("count", [16, 17])
@pytest.mark.parametrize("sized", [False, True])
def test_forward_is_the_hard_merge(prefix, count, sized):
    torch.manual_seed(0)
    x, metric = torch.randn(3, count, 5), torch.randn(3, count, 4, requires_grad=True)
    sizes = torch.rand(3, count) * 3 + 0.5 if sized else None
    matching, flow = straight_through_matching(metric, 4, prefix)
    for ours, theirs in zip(matching, bipartite_soft_matching(metric.detach(), 4, prefix), strict=True):
        assert ours == theirs if isinstance(ours, int) else torch.equal(ours, theirs)
    merged, new_sizes = merge_along_flow(x, sizes, matching, flow, prefix)
    expected, expected_sizes = merge_tokens(x, sizes, matching)
    torch.testing.assert_close(merged, expected)
    torch.testing.assert_close(new_sizes, expected_sizes)


def test_backward_is_that_of_the_soft_grouping():
    """By hand: what the loss says of every entry of the flow, handed on to the soft assignment."""
    torch.manual_seed(3)
    x, sizes = torch.randn(1, 9, 3), torch.rand(1, 9) + 0.5
    metric = torch.randn(1, 9, 4, requires_grad=True)
    readout, weight = torch.randn(7, 3), torch.randn(7)
    matching, flow = straight_through_matching(metric, 2)
    merged, new_sizes = merge_along_flow(x, sizes, matching, flow)
    ((merged[0] * readout).sum() + (new_sizes[0] * weight).sum()).backward()

    def loss(f):  # of a flow [4, 4], written out token by token: A = 2, 4, 6, 8, B = 1, 3, 5, 7
        rows = [x[0, 0]]
        masses = [sizes[0, 0]]
        for position in matching.staying[0, 1:3].tolist():  # unmerged A
            rows.append(x[0, position])
            masses.append(sizes[0, position] * (1 - f[(position - 2) // 2].sum()))
        for j in range(4):
            mass, total = sizes[0, 1 + 2 * j], sizes[0, 1 + 2 * j] * x[0, 1 + 2 * j]
            for i in range(4):
                mass = mass + f[i, j] * sizes[0, 2 + 2 * i]
                total = total + f[i, j] * sizes[0, 2 + 2 * i] * x[0, 2 + 2 * i]
            rows.append(total / mass)
            masses.append(mass)
        return (torch.stack(rows) * readout).sum() + (torch.stack(masses) * weight).sum()

    hard = torch.zeros(4, 4)
    for leaving, joined in zip(matching.leaving[0].tolist(), matching.joined[0].tolist(), strict=True):
        hard[(leaving - 2) // 2, joined - 3] = 1
    hard.requires_grad_()
    (of_flow,) = torch.autograd.grad(loss(hard), hard)
    z = torch.nn.functional.normalize(metric, dim=-1)
    soft = soft_grouping(z[:, 2::2] @ z[:, 1::2].transpose(1, 2), 2)
    (expected,) = torch.autograd.grad((soft[0] * of_flow).sum(), metric)
    torch.testing.assert_close(metric.grad, expected, rtol=1e-4, atol=1e-7)
    assert expected.abs().max() > 1e-4
