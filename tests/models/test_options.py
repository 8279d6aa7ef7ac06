"""Options of a pass end with their block, nest, and are seen by their own model and thread alone."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from dtem_hf import (
    DTEMConfig,
    ToMeConfig,
    attach,
    detach,
)
from tests.models.test_attach import Make, logits


def test_options_end_with_their_block_also_on_an_error(make_classifier: Make, pixels: Tensor) -> None:
    model = attach(make_classifier(), DTEMConfig(r=9))
    expected = logits(model, pixels)
    with pytest.raises(KeyError), model.unmerged():
        raise KeyError
    assert torch.equal(logits(model, pixels), expected)
    with model.trace_merging() as trace:
        logits(model, pixels)
    sizes = list(trace.sizes)
    logits(model, pixels[:1])
    assert all(a is b for a, b in zip(trace.sizes, sizes, strict=True))


def test_blocks_nest(make_classifier: Make, pixels: Tensor) -> None:
    model = attach(make_classifier(), DTEMConfig(r=9))
    with model.trace_merging() as outer:
        with model.unmerged(), model.trace_merging() as inner:
            assert torch.equal(logits(model, pixels), logits(make_classifier(), pixels))
        assert outer.sizes == inner.sizes == []
        with model.trace_merging() as inner:
            logits(model, pixels)
        assert len(inner.sizes) == 4
        assert outer.sizes == []
        logits(model, pixels)
        assert len(outer.sizes) == 4


def test_a_trace_sees_its_own_model_only(make_classifier: Make, pixels: Tensor) -> None:
    """Also where both run in the same pass, as a teacher inside a student does."""
    ours, other = (attach(make_classifier(), ToMeConfig(r=r)) for r in (9, 5))
    inside = []
    ours.vit.layers[1].register_forward_hook(lambda *_: inside.append(logits(other, pixels)))
    with ours.trace_merging() as trace:
        logits(ours, pixels)
        logits(other, pixels)
    assert [sizes.shape[1] for sizes in trace.sizes] == ours.merge_plan().tokens
    assert torch.equal(inside[0], logits(other, pixels))


@pytest.mark.parametrize("unmerged", [False, True])
def test_a_model_that_runs_inside_anothers_layers_changes_nothing_there(
    make_classifier: Make, pixels: Tensor, unmerged: bool
) -> None:
    """A teacher in a hook, merged or not, before and behind the first merge."""
    ours, other = (attach(make_classifier(), ToMeConfig(r=r)) for r in (9, 5))
    expected, inside = logits(ours, pixels), []
    for layer in ours.vit.layers:
        layer.register_forward_hook(lambda *_: inside.append(logits(other, pixels[:2])))
    if unmerged:
        detach(other)
    # A hook sees all tokens, which the last layer else leaves out: the same up to rounding.
    torch.testing.assert_close(logits(ours, pixels), expected, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(found, logits(other, pixels[:2])) for found in inside)


def test_a_new_thread_starts_with_no_options(make_classifier: Make, pixels: Tensor) -> None:
    model = attach(make_classifier(), ToMeConfig(r=9))
    expected, found = logits(model, pixels), []
    with model.unmerged():
        thread = threading.Thread(target=lambda: found.append(logits(model, pixels)))
        thread.start()
        thread.join()
    torch.testing.assert_close(found[0], expected, atol=1e-6, rtol=1e-6)


def test_a_layer_called_on_its_own_is_the_stock_layer(make_classifier: Make) -> None:
    plain, model = make_classifier(), attach(make_classifier(), ToMeConfig(r=9))
    x = torch.randn(2, 65, 32)
    assert torch.equal(model.vit.layers[0](x), plain.vit.layers[0](x))
