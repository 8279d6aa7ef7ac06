"""What modules of one pass know of each other, and who does not see it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dtem_hf import ToMeConfig, attach
from dtem_hf.scope import Scope, current_scope, current_state, open_scope
from dtem_hf.token_state import TokenState


def state() -> TokenState:
    return TokenState(lambda num_tokens: [1], 1)


def test_outside_of_all_there_is_nothing() -> None:
    assert current_scope() is current_state() is None


def test_the_innermost_scope_is_the_current_one() -> None:
    outer, inner = Scope(state=state()), Scope(reader="mean")
    with open_scope(outer) as opened:
        assert opened is outer
        assert current_state() is outer.state
        with open_scope(inner):
            assert current_scope() is inner
            assert current_state() is None
        assert current_scope() is outer
    assert current_scope() is None


def test_a_scope_ends_with_its_block_also_on_an_error() -> None:
    outer = Scope()
    with open_scope(outer):
        with pytest.raises(KeyError), open_scope(Scope()):
            raise KeyError
        assert current_scope() is outer
    assert current_scope() is None


def test_threads_do_not_see_each_other() -> None:
    """Each opens its scope while the other's is open."""
    both_open, seen = threading.Barrier(2), {}

    def run(name: str) -> None:
        seen[name, "before"] = current_scope()
        with open_scope(Scope(num_tokens=len(name))) as ours:
            both_open.wait(timeout=30)
            seen[name, "inside"] = current_scope() is ours
            both_open.wait(timeout=30)

    threads = [threading.Thread(target=run, args=(name,)) for name in ("a", "bb")]
    with open_scope(Scope()):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert seen == {(name, when): when == "inside" or None for name in ("a", "bb") for when in ("before", "inside")}


def test_dynamo_traces_scopes_without_a_break_and_leaves_none_open() -> None:
    """Nested ones, with what is read from them in the graph; outside of a trace nothing of it is seen."""

    def weigh(x: Tensor) -> Tensor:
        scope = current_scope()
        assert scope is not None
        return x * scope.num_tokens

    def run(x: Tensor) -> Tensor:
        with open_scope(Scope(num_tokens=2)):
            x = weigh(x)
            with open_scope(Scope(num_tokens=5)):
                x = weigh(x)
            return weigh(x)

    x = torch.ones(3)
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    for _ in range(2):
        assert compiled(x).tolist() == [20.0] * 3
        assert run(x).tolist() == [20.0] * 3
        assert current_scope() is None


def test_a_compiled_pass_leaves_nothing_to_an_eager_one(make_classifier: Callable[..., Any], pixels: Tensor) -> None:
    """Nor the other way round."""
    model = attach(make_classifier(num_hidden_layers=2), ToMeConfig(r=9))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected = model(pixels).logits
        torch.testing.assert_close(compiled(pixels).logits, expected, atol=1e-6, rtol=1e-6)
        assert torch.equal(model(pixels).logits, expected)
        torch.testing.assert_close(compiled(pixels[:1]).logits, expected[:1], atol=1e-5, rtol=1e-5)
    assert current_scope() is None


def test_nothing_of_a_pass_stays_on_the_model(make_classifier: Callable[..., Any], pixels: Tensor) -> None:
    model = attach(make_classifier(), ToMeConfig(r=9))
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
    model(pixels)
    for name, module in model.named_modules():
        assert vars(module).keys() == attributes[name].keys()
        assert all(value is attributes[name][key] for key, value in vars(module).items())
    assert current_scope() is None
