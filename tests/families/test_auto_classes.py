"""The Auto classes of this package load every class of every family merged; transformers' own are left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import dtem_hf
from dtem_hf import (
    DTEMConfig,
    ToMeConfig,
    attach,
    register,
    unregister,
)
from tests.support.ecosystem import (
    models_of,
)
from tests.support.families import CASES
from tests.support.family_case import FamilyCase


MERGE = ToMeConfig(r=6)
AUTO = [(case, auto, model_class) for case in CASES.values() for auto, model_class in models_of(case)]
by_model = pytest.mark.parametrize(
    "case, auto, model_class", AUTO, ids=[f"{auto}-{model_class.__name__}" for _, auto, model_class in AUTO]
)


def same_weights(ours: Any, theirs: Any) -> bool:
    ours, theirs = ours.state_dict(), theirs.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@by_model
def test_auto_classes_of_our_own_merge(case: FamilyCase, auto: str, model_class: Any, tmp_path: Path) -> None:
    """A base checkpoint with a learned method, and what was saved merged."""
    plain = case.make_small(model_class)
    plain.save_pretrained(tmp_path)
    ours = getattr(dtem_hf, auto)
    merged = ours.from_pretrained(tmp_path, merge=DTEMConfig(r=6))
    assert type(merged) is type(attach(plain, DTEMConfig(r=6)))
    assert same_weights(merged, plain)
    merged.save_pretrained(tmp_path)
    again = ours.from_pretrained(tmp_path)
    assert type(again) is type(merged)
    assert same_weights(again, merged)


def test_registration_is_idempotent_and_undone() -> None:
    """For every Auto class and config, down to the order of several classes for one config."""

    def chosen() -> list[tuple[type, ...]]:
        found = [getattr(transformers, auto)._model_mapping[cls.config_class] for _, auto, cls in AUTO]
        return [each if isinstance(each, tuple) else (each,) for each in found]

    before = chosen()
    unregister()
    assert chosen() == before
    register()
    once = chosen()
    register()
    assert chosen() == once
    assert all(
        issubclass(one, other) for a, b in zip(once, before, strict=True) for one, other in zip(a, b, strict=True)
    )
    assert not set(once) & set(before)
    unregister()
    unregister()
    assert chosen() == before
