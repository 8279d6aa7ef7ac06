"""What a graph holds: that of torch.compile computes as eager does, that of torch.export has forms of its own."""

import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn

from dtem_hf import ops


class SaysSo(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if ops.is_exporting() else x


def test_only_an_export_is_one():
    x = torch.zeros(3)
    assert not ops.is_exporting()
    assert torch.equal(torch.compile(SaysSo(), backend="eager", fullgraph=True)(x), x)
    assert torch.equal(torch.export.export(SaysSo(), (x,)).module()(x), x + 1)


@pytest.mark.skipif(Version(torch.__version__) < Version("2.13"), reason="Dynamo of torch 2.13 is the first to know")
def test_a_strict_export_is_one():
    x = torch.zeros(3)
    assert torch.equal(torch.export.export(SaysSo(), (x,), strict=True).module()(x), x + 1)


class Matches(nn.Module):
    def __init__(self, r: int) -> None:
        super().__init__()
        self.r = r

    def forward(self, metric: Tensor) -> tuple[Tensor, ...]:
        return tuple(ops.bipartite_soft_matching(metric, self.r))


@pytest.mark.parametrize("r", [1, 40, 90])
def test_compiled_and_exported_matching_orders_equal_scores_as_eager_does(r):
    torch._dynamo.reset()
    metric = torch.nn.functional.one_hot(torch.arange(200) % 3, 8).float().expand(2, -1, -1)
    expected = Matches(r)(metric)
    assert expected[0].tolist() == [[2 * i + 2 for i in range(r)]] * 2
    compiled = torch.compile(Matches(r), backend="eager", fullgraph=True)
    for graph in (compiled, torch.export.export(Matches(r), (metric,)).module()):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(graph(metric), expected, strict=True))
