"""What travels with the tokens of one pass."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map

from dtem_hf import ToMeConfig, attach
from dtem_hf.errors import UnsupportedModelError
from dtem_hf.models.install import merged_layers
from dtem_hf.scope import current_state
from dtem_hf.token_state import MergeTrace, TokenState
from tests.support.families import CASES


def state(reductions: list[int], trace: MergeTrace | None = None, masked: bool = False) -> TokenState:
    return TokenState(lambda num_tokens: reductions, 1, trace=trace, masked=masked)


def same(positions: torch.Tensor) -> torch.Tensor:
    return positions


def merged(ours: TokenState, sizes: torch.Tensor) -> None:
    """The first layer leaves three tokens of the given sizes."""
    ours.record_merge(0, torch.zeros(1, 3, 4), sizes, 3, lambda: torch.zeros(1, 5).long(), same)


def test_while_all_sizes_are_one_the_models_own_mask_is_used() -> None:
    mask = torch.zeros(1, 1, 5, 5)
    for given in (mask, None):
        assert state([2, 2], masked=given is not None).attention_bias(0, torch.float32, given, True) is given


def test_sizes_become_a_bias_in_the_dtype_that_attention_computes_in() -> None:
    ours = state([2, 2])
    assert ours.begin_layer(0, 5) == (5, 2)
    ours.record_merge(
        0, torch.zeros(1, 3, 4), torch.tensor([[1.0, 2.0, 2.0]]), 3, lambda: torch.zeros(1, 5).long(), same
    )
    assert ours.begin_layer(1, 3) == (3, 2)
    bias = ours.attention_bias(1, torch.float32, None, True)
    assert bias is not None
    torch.testing.assert_close(bias, torch.tensor([[[[1.0, 2.0, 2.0]]]]).log())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = ours.attention_bias(1, torch.float32, None, True)
    assert under_autocast is not None and under_autocast.dtype == torch.bfloat16
    assert ours.attention_bias(1, torch.float32, torch.zeros(1, 1, 5, 5), wanted=False) is None


def test_a_users_mask_cannot_follow_merged_tokens() -> None:
    ours = state([2, 2], masked=True)
    ours.begin_layer(0, 5)
    ours.record_merge(
        0, torch.zeros(1, 3, 4), torch.tensor([[1.0, 2.0, 2.0]]), 3, lambda: torch.zeros(1, 5).long(), same
    )
    with pytest.raises(UnsupportedModelError, match=r"attention_mask.*r=0"):
        ours.attention_bias(1, torch.float32, torch.zeros(1, 1, 5, 5), True)


def test_a_layer_that_runs_again_reads_and_records_what_it_did_before() -> None:
    """Gradient checkpointing recomputes a layer when later ones have recorded their own sizes."""
    trace = MergeTrace()
    ours = state([1, 1], trace)
    first, second = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]])
    for _ in range(2):
        assert ours.begin_layer(0, 3) == (3, 1)
        ours.record_merge(0, torch.zeros(1, 2, 4), first, 2, lambda: torch.tensor([[0, 1, 1]]), same)
        assert ours.begin_layer(1, 2) == (2, 1)
        assert ours.sizes(1) is first
        ours.record_merge(1, torch.zeros(1, 1, 4), second, 1, lambda: torch.tensor([[0, 0]]), same)
    assert [sizes.tolist() for sizes in trace.sizes] == [[[1.0, 2.0]], [[3.0]]]
    assert [source.tolist() for source in trace.source_maps] == [[[0, 1, 1]], [[0, 0, 0]]]


def test_source_maps_are_made_only_for_a_trace() -> None:
    def never() -> torch.Tensor:
        raise AssertionError("no source map is wanted")

    ours = state([1])
    ours.begin_layer(0, 3)
    ours.record_merge(0, torch.zeros(1, 2, 4), torch.tensor([[1.0, 2.0]]), 2, never, same)
    assert ours.changed


def test_positions_are_carried_along_and_stay_where_nothing_merges() -> None:
    ours = state([0, 1])
    ours.begin_layer(0, 3)
    ours.place(torch.tensor([[[0.0], [1.0], [2.0]]]))
    ours.record_unchanged(0, torch.zeros(1, 3, 4))
    assert ours.positions(1) is ours.positions(0)
    assert not ours.changed
    ours.begin_layer(1, 3)
    ours.record_merge(
        1,
        torch.zeros(1, 2, 4),
        torch.tensor([[1.0, 2.0]]),
        2,
        lambda: torch.tensor([[0, 1, 1]]),
        lambda positions: positions[:, :2] + 0.5,
    )
    assert ours.positions(2).tolist() == [[[0.5], [1.5]]]
    assert ours.has_merged(2) and not ours.has_merged(1)


@torch.no_grad()
@pytest.mark.parametrize("family", ["dinov3_vit", "vjepa2", "qwen2_vl"])
def test_what_travels_with_tokens_moves_before_the_first_merge(family: str) -> None:
    """The first layer merges nothing, and all others lie on another device: "meta", which computes shapes alone."""
    case = CASES[family]
    model = attach(case.make(case.encoder), ToMeConfig(r=[0, 3, 3, 3], unmerge=True))
    layers, states = merged_layers(model), []

    def move(layer: Any, args: Any, kwargs: Any) -> Any:
        return tree_map(lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x, (args, kwargs))

    for layer in layers[1:]:
        layer.to("meta").register_forward_pre_hook(move, with_kwargs=True)
    layers[-1].register_forward_hook(lambda *_: states.append(current_state()))
    with contextlib.suppress(RuntimeError):  # what stands behind the layers lies on the CPU
        model(**case.inputs(2))
    for state in [part for _, part in states[0].parts] or states:
        for index in range(1, len(layers) + 1):
            positions = state.positions(index)
            assert positions.shape[1] == state.num_tokens - 3 * (index - 1)
            assert positions.is_meta and state.source(index - 1).is_meta


def test_padding_is_left_out_of_attention_as_the_model_leaves_it_out() -> None:
    ours = TokenState(lambda num_tokens: [1], 0, sizes=torch.tensor([[1.0, 1.0, 0.0, 0.0]]))
    mask = torch.zeros(1, 1, 1, 4)
    assert ours.attention_bias(0, torch.float32, mask, True) is mask
    ours.begin_layer(0, 4)
    ours.record_merge(
        0, torch.zeros(1, 3, 4), torch.tensor([[1.0, 1.0, 0.0]]), 3, lambda: torch.zeros(1, 4).long(), same
    )
    for wanted in (True, False):
        bias = ours.attention_bias(1, torch.float32, None, wanted)
        assert bias is not None
        assert bias.softmax(-1).tolist() == [[[[0.5, 0.5, 0.0]]]]
