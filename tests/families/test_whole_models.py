"""Models that do more than see: text towers, decoders, heads that need every token in its place."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from dtem_hf import attach, detach
from dtem_hf.families import find_encoder
from tests.families.test_promises import METHODS
from tests.support.families import CASES
from tests.support.family_case import FamilyCase
from tests.support.unmerging import tensors


OTHERS = [(case, model_class) for case in CASES.values() for model_class in case.others]


DENSE = [(case, model_class) for case in CASES.values() for model_class in case.dense]


WHOLE = [*OTHERS, *DENSE]


@pytest.mark.parametrize("case, model_class", WHOLE, ids=[model_class.__name__ for _, model_class in WHOLE])
def test_a_model_that_does_more_than_see_is_counted_as_its_encoder(case: FamilyCase, model_class: Any) -> None:
    model, encoder = case.make_small(model_class), case.make_small(case.encoder)
    if getattr(find_encoder(model)[1], "pooler", None) is None and hasattr(encoder, "pooler"):
        encoder.pooler = None
    whole, alone = (attach(each, METHODS["tome"]).merge_plan() for each in (model, encoder))
    assert whole.multiply_adds == alone.multiply_adds
    assert whole.unmerged_multiply_adds == alone.unmerged_multiply_adds


def runs_on_inputs(case: FamilyCase, model_class: Any) -> bool:
    """Whether a model needs no more than what it sees and a text."""
    given = {**case.inputs(1), **case.words(model_class, 1)}
    wanted = inspect.signature(model_class.forward).parameters.values()
    return all(p.name in given or p.default is not p.empty or p.kind is p.VAR_KEYWORD for p in [*wanted][1:])


# BEiT's and Data2Vec's decoders need a deeper model, and are tested in the families' own files.
RUNNING = [pair for pair in WHOLE if pair[0].family not in ("beit", "data2vec_vision") and runs_on_inputs(*pair)]


@torch.no_grad()
@pytest.mark.parametrize("case, model_class", RUNNING, ids=[model_class.__name__ for _, model_class in RUNNING])
def test_a_model_that_does_more_than_see_is_the_plain_one_where_nothing_merges(
    case: FamilyCase, model_class: Any
) -> None:
    """At r = 0, unmerged and detached, bit for bit."""
    inputs = {**case.inputs(2), **case.words(model_class, 2)}
    expected, model = tensors(case.make(model_class)(**inputs)), attach(case.make(model_class), METHODS["tome"])
    with model.unmerged():
        assert all(map(torch.equal, tensors(model(**inputs)), expected))
    model.set_reduction(0)
    assert all(map(torch.equal, tensors(model(**inputs)), expected))
    assert all(map(torch.equal, tensors(detach(model)(**inputs)), expected))
    assert len(expected) > 0


WITH_TEXT = [(case, model_class) for case, model_class in OTHERS if case.words(model_class, 1)]


@torch.no_grad()
@pytest.mark.parametrize("case, model_class", WITH_TEXT, ids=[model_class.__name__ for _, model_class in WITH_TEXT])
def test_a_model_with_text_reads_the_merged_tokens_of_its_tower(case: FamilyCase, model_class: Any) -> None:
    """As they are when its tower is called by itself."""
    model, images = attach(case.make(model_class), METHODS["tome"]), case.inputs(2)
    tower = find_encoder(model)[1]
    seen: list[Tensor] = []
    tower.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    model(**images, **case.words(model_class, 2))
    tower(**images)
    assert len(seen) == 2
    assert seen[0].shape[1] == model.merge_plan().tokens[-1] < model.merge_plan().num_tokens
    assert torch.equal(*seen)
