"""torch.compile: one graph for any batch while r stays, one more for each new r, none for an r that was seen."""

import pytest
import torch
from torch._dynamo.utils import counters

from dtem_hf import DTEMConfig, ToMeConfig, attach


@pytest.fixture(autouse=True)
def _no_graphs_yet():
    torch._dynamo.reset()
    counters.clear()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def noise(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32)


@pytest.mark.parametrize("config", [ToMeConfig(r=6), DTEMConfig(r=6)], ids=["tome", "dtem"])
@torch.inference_mode()
def test_one_graph_for_any_batch(make_classifier, config):
    model = attach(make_classifier(num_hidden_layers=2), config)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    compiled(noise(2))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for count in (3, 7, 32):
            pixels = noise(count)
            torch.testing.assert_close(compiled(pixels).logits, model(pixels).logits, atol=1e-5, rtol=1e-5)
    assert graphs() == 1


@torch.inference_mode()
def test_as_many_graphs_as_amounts_of_merging(make_bare):
    """Of one layer, all of whose tokens are compared."""
    model = attach(make_bare(num_hidden_layers=1), ToMeConfig(r=6))
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    amounts = [6, 3, [8]]
    for seen, r in enumerate(amounts, start=1):
        model.set_reduction(r)
        compiled(noise(5))  # not 3, which the compiler would take for the number of channels
        assert graphs() == seen
    with torch._dynamo.config.patch(error_on_recompile=True):
        for r in (3, [8], 6, 3):
            model.set_reduction(r)
            pixels = noise(7)
            ours, theirs = compiled(pixels).last_hidden_state, model(pixels).last_hidden_state
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert graphs() == len(amounts)
