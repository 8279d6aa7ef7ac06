"""What reads merged tokens, against loops over the tokens that they stand for."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from dtem_hf.families.readers import (
    Averaged,
    Averaging,
    MaskedAveraging,
    ScopedForward,
    WeighedAttention,
    WeighedMean,
    finish_output,
    weigh_tokens,
)
from dtem_hf.scope import Scope, current_scope, open_scope
from dtem_hf.token_state import TokenState


# Two layers: 7 tokens to 5 to 4, of which the first is prefix.
FIRST, SECOND = torch.tensor([[0, 1, 2, 1, 3, 4, 4]]), torch.tensor([[0, 1, 2, 1, 3]])
SOURCES = [[0, 1, 2, 1, 3, 4, 4], [0, 1, 2, 1, 1, 3, 3]]
SIZES = torch.tensor([[1.0, 3.0, 1.0, 2.0]])


def merged_state(keep_sources: bool = True) -> TokenState:
    state = TokenState(lambda num_tokens: [2, 1], 1, keep_sources=keep_sources)
    for layer, (source, sizes) in enumerate([(FIRST, torch.tensor([[1.0, 2, 1, 1, 2]])), (SECOND, SIZES)]):
        state.enter(layer, source.shape[1])
        x = torch.zeros(1, sizes.shape[1], 3)
        state.leave(layer, x, sizes, sizes.shape[1], lambda source=source: source, lambda positions: positions)
    return state


def soft_state(sizes: Tensor) -> TokenState:
    """All tokens stay, and their sizes change."""
    state = TokenState(lambda num_tokens: [1], 1, keep_sources=True)
    state.enter(0, sizes.shape[1])
    x, source = torch.zeros(*sizes.shape, 3), torch.tensor([[0, 2, 1, 3]])
    state.leave(0, x, sizes, sizes.shape[1] - 1, lambda: source, lambda positions: positions)
    return state


def idle_state() -> TokenState:
    state = TokenState(lambda num_tokens: [0], 1, keep_sources=True)
    state.enter(0, 4)
    state.pass_on(0, torch.zeros(1, 4, 3))
    return state


def mean_over_patches(x: Tensor) -> Tensor:
    """The mean that the unmerged model would take: every original patch is the token it was merged into."""
    return sum(x[0, place] for place in SOURCES[1][1:]) / 6


def unmerged(x: Tensor, layer: int) -> Tensor:
    return torch.stack([x[0, place] for place in SOURCES[layer]]).unsqueeze(0)


def test_the_plain_mean_of_weighed_tokens_is_the_mean_over_patches() -> None:
    x = torch.randn(1, 4, 3)
    weighed = weigh_tokens(x, merged_state())
    assert torch.equal(weighed[:, 0], x[:, 0])
    torch.testing.assert_close(weighed[0, 1:].mean(dim=0), mean_over_patches(x), atol=1e-6, rtol=1e-6)


def test_a_soft_mean_divides_by_the_tokens_that_are_there() -> None:
    x, sizes = torch.randn(1, 4, 3), torch.tensor([[1.0, 1.7, 0.0, 1.2]])
    weighed = weigh_tokens(x, soft_state(sizes))
    expected = (1.7 * x[0, 1] + 1.2 * x[0, 3]) / 3
    torch.testing.assert_close(weighed[0, 1:].mean(dim=0), expected, atol=1e-6, rtol=1e-6)


def test_where_nothing_was_merged_tokens_are_the_same_object() -> None:
    x = torch.randn(1, 4, 3)
    assert weigh_tokens(x, idle_state()) is x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_float32_and_tokens_keep_their_dtype(dtype: torch.dtype) -> None:
    x = torch.randn(1, 4, 3).to(dtype)
    weighed = weigh_tokens(x, merged_state())
    assert weighed.dtype == dtype
    exact = torch.stack([x[0, i].double() * SIZES[0, i].double() * 3 / 6 for i in (1, 2, 3)])
    assert torch.equal(weighed[0, 1:], exact.to(dtype))


def outputs(x: Tensor, recorded: tuple[Tensor, ...], attentions: tuple[Tensor, ...], kind: str) -> Any:
    pooled = torch.ones(1, 3)
    if kind == "tuple":
        return (x, pooled, recorded, attentions)
    return BaseModelOutputWithPooling(
        last_hidden_state=x, pooler_output=pooled, hidden_states=recorded, attentions=attentions
    )


@pytest.mark.parametrize("kind", ["tuple", "output"])
@pytest.mark.parametrize("unmerge", [False, True])
@pytest.mark.parametrize("average", [False, True])
def test_what_an_encoder_hands_on(kind: str, unmerge: bool, average: bool) -> None:
    """All tokens back in place, or such that their plain mean is right; then either is."""
    x = torch.randn(1, 4, 3)
    recorded = (torch.randn(1, 7, 3), torch.randn(1, 5, 3), torch.randn(1, 4, 3))
    attentions = (torch.rand(1, 2, 7, 7), torch.rand(1, 2, 5, 5))
    finished = finish_output(outputs(x, recorded, attentions, kind), merged_state(), unmerge, average)
    last, pooled, states, weights = finished if kind == "tuple" else finished.to_tuple()
    assert torch.equal(pooled, torch.ones(1, 3))
    assert all(a is b for a, b in zip(weights, attentions, strict=True))
    if unmerge:
        assert torch.equal(last, unmerged(x, 1))
        expected = (recorded[0], unmerged(recorded[1], 0), unmerged(recorded[2], 1))
        assert all(torch.equal(a, b) for a, b in zip(states, expected, strict=True))
    else:
        assert last.shape == (1, 4, 3)
        assert all(a is b for a, b in zip(states, recorded, strict=True))
        assert torch.equal(last, x) is not average
    if unmerge or average:
        torch.testing.assert_close(last[0, 1:].mean(dim=0), mean_over_patches(x), atol=1e-6, rtol=1e-6)


def test_softly_merged_tokens_are_weighed_and_put_back() -> None:
    """None of them left, so being put back does not repeat them."""
    x, sizes = torch.randn(1, 4, 3), torch.tensor([[1.0, 1.7, 0.1, 1.2]])
    (last,) = finish_output((x,), soft_state(sizes), unmerge=True, average=True)
    weighed = x * torch.tensor([1.0, 1.7, 0.1, 1.2]).unsqueeze(-1)
    torch.testing.assert_close(last, weighed[:, [0, 2, 1, 3]], atol=1e-6, rtol=1e-6)


def test_an_output_without_hidden_states_stays_without() -> None:
    finished = finish_output(BaseModelOutputWithPooling(torch.randn(1, 4, 3)), merged_state(), True, False)
    assert list(finished) == ["last_hidden_state"]
    assert finished[0].shape == (1, 7, 3)


def mixed(module: nn.Module, *mixins: type) -> Any:
    """As attaching does it: the class changes, the module stays."""
    module.__class__ = type(type(module).__name__, (*mixins, type(module)), {})
    return module


class MeanPooler(nn.Module):
    def __init__(self, with_norm: bool = True) -> None:
        super().__init__()
        self.layernorm = nn.Identity() if with_norm else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states[:, 1:].mean(1) if self.layernorm is not None else hidden_states[:, 0]


@pytest.mark.parametrize("with_norm", [True, False], ids=["mean", "first token"])
def test_a_pooler_that_averages(with_norm: bool) -> None:
    x, plain, pooler = torch.randn(1, 4, 3), MeanPooler(with_norm), mixed(MeanPooler(with_norm), WeighedMean)
    assert torch.equal(pooler(x), plain(x))
    with open_scope(Scope(idle_state())):
        assert torch.equal(pooler(x), plain(x))
    with open_scope(Scope(merged_state())):
        expected = mean_over_patches(x) if with_norm else x[0, 0]
        torch.testing.assert_close(pooler(x)[0], expected, atol=1e-6, rtol=1e-6)


def test_a_head_that_attends_counts_every_token_as_often_as_it_stands_for_patches() -> None:
    """Three probes, two heads, an image alone and in a batch: each as if all patches were there."""
    plain = nn.MultiheadAttention(4, 2, batch_first=True)
    head = mixed(nn.MultiheadAttention(4, 2, batch_first=True), WeighedAttention)
    head.load_state_dict(plain.state_dict())
    probes, x = torch.randn(1, 3, 4), torch.randn(1, 4, 4)
    assert torch.equal(head(probes, x, x)[0], plain(probes, x, x)[0])
    patches = unmerged(x, 1)
    with open_scope(Scope(merged_state())):
        ours, theirs = head(probes, x, x)[0], plain(probes, patches, patches)[0]
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


class Encoder(nn.Module):
    """Stands for a merged encoder: what it hands on is read off the wishes of the scope it runs in."""

    def __init__(self, make_state: Callable[[], TokenState] = merged_state, unmerge: bool = False) -> None:
        super().__init__()
        self.make_state, self.unmerge = make_state, unmerge

    def forward(self, x: Tensor) -> tuple[Tensor]:
        scope, state = current_scope(), self.make_state()
        if scope is None:
            return (x,)
        scope.state, scope.unmerged = state, scope.unmerges or self.unmerge
        scope.num_tokens += x.shape[1]
        return finish_output((x,), state, scope.unmerged, scope.averages)


class Norm(nn.Module):
    """A module around an encoder that normalises its tokens, as a base model does."""

    def __init__(self, encoder: nn.Module | None = None) -> None:
        super().__init__()
        self.encoder = encoder or Encoder()

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.encoder(x)[0].tanh(),)


class Classifier(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.inner(pixel_values)[0][:, 1:].mean(dim=1)


@pytest.mark.parametrize("mixin", [Averaging, MaskedAveraging])
def test_a_model_that_averages_gets_the_mean_over_patches(mixin: type) -> None:
    x = torch.randn(1, 4, 3)
    model = mixed(Classifier(Encoder()), mixin)
    torch.testing.assert_close(model(x)[0], mean_over_patches(x), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(model(pixel_values=x)[0], mean_over_patches(x), atol=1e-6, rtol=1e-6)
    assert list(inspect.signature(type(model).forward).parameters) == ["self", "pixel_values", "labels"]
    assert current_scope() is None


def test_what_is_normalised_before_it_is_averaged_is_weighed_behind_the_norm() -> None:
    x = torch.randn(1, 4, 3)
    model = mixed(Classifier(mixed(Norm(), Averaged)), Averaging)
    torch.testing.assert_close(model(x)[0], mean_over_patches(x.tanh()), atol=1e-6, rtol=1e-6)
    assert torch.equal(mixed(Norm(), Averaged)(x)[0], x.tanh())  # nobody averages


@pytest.mark.parametrize("soft", [False, True])
def test_tokens_that_are_back_in_place_are_weighed_behind_the_norm_as_well(soft: bool) -> None:
    """Hard-merged ones are there as often as they count; a soft merge leaves each with its own size."""
    x, sizes = torch.randn(1, 4, 3), torch.tensor([[1.0, 1.7, 0.1, 1.2]])
    encoder = Encoder(lambda: soft_state(sizes) if soft else merged_state(), unmerge=True)
    model = mixed(Classifier(mixed(Norm(encoder), Averaged)), Averaging)
    expected = sum(sizes[0, i] * x[0, i].tanh() for i in (1, 2, 3)) / 3 if soft else mean_over_patches(x.tanh())
    torch.testing.assert_close(model(x)[0], expected, atol=1e-6, rtol=1e-6)


def test_a_scoped_forward_knows_its_arguments_by_name() -> None:
    seen: list[dict[str, Any]] = []

    class Recording(ScopedForward):
        def _run_in_scope(self, stock: Any, inputs: dict[str, Any]) -> Any:
            seen.append(inputs)
            return stock()

    x = torch.randn(1, 4, 3)
    model, plain = mixed(Classifier(Encoder()), Recording), Classifier(Encoder())
    for arguments, keywords in [((x,), {}), ((x, None), {}), ((), {"pixel_values": x, "labels": None})]:
        assert torch.equal(model(*arguments, **keywords), plain(*arguments, **keywords))
    assert [list(inputs) for inputs in seen] == [["pixel_values"], *[["pixel_values", "labels"]] * 2]
    with pytest.raises(TypeError, match="colour"):
        model(x, colour="red")
