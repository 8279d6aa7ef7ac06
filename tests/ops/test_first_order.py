"""The first-order change of an edge is the derivative along that merge."""

import pytest
import torch

from dtem_hf.ops import first_order_change


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("count", [11, 12])
def test_edges_one_by_one(prefix, sized, count):
    torch.manual_seed(0)
    x, readout = torch.randn(2, count, 3), torch.randn(count, 3)
    sizes = torch.rand(2, count) * 4 + 0.5 if sized else None

    def output(tokens):  # of one image, and not linear in them
        return (torch.tanh(tokens) * readout).sum() + tokens.prod(dim=-1).sum()

    x.requires_grad_()
    (gradient,) = torch.autograd.grad(output(x[0]) + output(x[1]), x)
    x = x.detach()
    change = first_order_change(x, sizes, gradient, prefix)
    weights = torch.ones(2, count) if sizes is None else sizes
    evens = [i for i in range(count) if i >= prefix and i % 2 == 0]
    odds = [i for i in range(count) if i >= prefix and i % 2 == 1]
    assert change.shape == (2, len(evens), len(odds))
    for image in range(2):
        for row, i in enumerate(evens):
            for column, j in enumerate(odds):
                m_i, m_j = weights[image, i].double(), weights[image, j].double()
                merged = x[image].double().clone()
                mean = (m_i * merged[i] + m_j * merged[j]) / (m_i + m_j)
                merged[i] = merged[j] = mean
                step = 1e-5 * (merged - x[image].double())
                ahead, behind = (output(x[image].double() + s) for s in (step, -step))
                derivative = ((ahead - behind) / 2e-5).item()
                assert change[image, row, column].item() == pytest.approx(derivative, rel=1e-4, abs=1e-5)


def test_tokens_of_no_size_change_nothing():
    x, gradient = torch.randn(1, 6, 3), torch.randn(1, 6, 3)
    change = first_order_change(x, torch.tensor([[1.0, 1, 0, 0, 1, 1]]), gradient, 0)
    assert change.isfinite().all() and change[0, 1, 1] == 0
