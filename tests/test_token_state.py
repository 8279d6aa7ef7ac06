"""What travels with the tokens of one pass."""

from __future__ import annotations

import pytest
import torch

from dtem_hf.errors import UnsupportedModelError
from dtem_hf.token_state import MergeTrace, TokenState


def state(reductions: list[int], trace: MergeTrace | None = None, masked: bool = False) -> TokenState:
    return TokenState(lambda num_tokens: reductions, 1, trace=trace, masked=masked)


def test_while_all_sizes_are_one_the_models_own_mask_is_used() -> None:
    mask = torch.zeros(1, 1, 5, 5)
    for given in (mask, None):
        assert state([2, 2], masked=given is not None).attention_bias(0, torch.float32, given, True) is given


def test_sizes_become_a_bias_in_the_dtype_that_attention_computes_in() -> None:
    ours = state([2, 2])
    assert ours.enter(0, 5) == (5, 2)
    ours.leave(0, torch.zeros(1, 3, 4), torch.tensor([[1.0, 2.0, 2.0]]), 3, lambda: torch.zeros(1, 5).long())
    assert ours.enter(1, 3) == (3, 2)
    bias = ours.attention_bias(1, torch.float32, None, True)
    assert bias is not None
    torch.testing.assert_close(bias, torch.tensor([[[[1.0, 2.0, 2.0]]]]).log())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = ours.attention_bias(1, torch.float32, None, True)
    assert under_autocast is not None and under_autocast.dtype == torch.bfloat16
    assert ours.attention_bias(1, torch.float32, torch.zeros(1, 1, 5, 5), wanted=False) is None


def test_a_users_mask_cannot_follow_merged_tokens() -> None:
    ours = state([2, 2], masked=True)
    ours.enter(0, 5)
    ours.leave(0, torch.zeros(1, 3, 4), torch.tensor([[1.0, 2.0, 2.0]]), 3, lambda: torch.zeros(1, 5).long())
    with pytest.raises(UnsupportedModelError, match=r"attention_mask.*r=0"):
        ours.attention_bias(1, torch.float32, torch.zeros(1, 1, 5, 5), True)


def test_a_layer_that_runs_again_reads_and_records_what_it_did_before() -> None:
    """Gradient checkpointing recomputes a layer when later ones have long left their own sizes."""
    trace = MergeTrace()
    ours = state([1, 1], trace)
    first, second = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]])
    for _ in range(2):
        assert ours.enter(0, 3) == (3, 1)
        ours.leave(0, torch.zeros(1, 2, 4), first, 2, lambda: torch.tensor([[0, 1, 1]]))
        assert ours.enter(1, 2) == (2, 1)
        assert ours.sizes(1) is first
        ours.leave(1, torch.zeros(1, 1, 4), second, 1, lambda: torch.tensor([[0, 0]]))
    assert [sizes.tolist() for sizes in trace.sizes] == [[[1.0, 2.0]], [[3.0]]]
    assert [source.tolist() for source in trace.source_maps] == [[[0, 1, 1]], [[0, 0, 0]]]


def test_source_maps_are_made_only_for_a_trace() -> None:
    def never() -> torch.Tensor:
        raise AssertionError("nobody asked")

    ours = state([1])
    ours.enter(0, 3)
    ours.leave(0, torch.zeros(1, 2, 4), None, 2, never)
    assert ours.sizes(1) is None
