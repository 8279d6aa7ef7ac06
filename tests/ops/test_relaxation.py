"""Soft grouping and soft merging against the literal definition, values and gradients, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dtem_hf import ops
from tests.support import slow_reference as slow


# Below this a gradient is nothing: that of a choice which is already made.
VANISHING = 1e-6


def soft_merging(
    x: Tensor, sizes: Tensor, metric: Tensor, active: int, r: int, prefix: int = 1, **options: float
) -> tuple[Tensor, Tensor]:
    assignment = ops.soft_assignment(metric, active, r, prefix, **options)
    return ops.move_mass(x, sizes, assignment, active, prefix)


def cosines(*shape: int) -> Tensor:
    return torch.rand(*shape) * 2 - 1


# The published temperatures divide a score by 0.01, and so multiply float32's rounding of it by 100; milder ones show
# that nothing else is lost. Values are held to the first number, gradients (relative to their norm) to the second.
TEMPERATURES = pytest.mark.parametrize(
    "temperatures, value_error, gradient_error",
    [((0.1, 0.1), 1e-4, 1e-3), ((0.5, 1.0), 1e-6, 1e-6)],
    ids=["published", "mild"],
)


@pytest.mark.parametrize("rows, columns", [(8, 8), (9, 7), (5, 2)])
@pytest.mark.parametrize("r", [1, 4])
@pytest.mark.parametrize("top_k", [1, 3])
@TEMPERATURES
def test_grouping_equals_its_definition_over_all_entries(
    rows: int,
    columns: int,
    r: int,
    top_k: int,
    temperatures: tuple[float, float],
    value_error: float,
    gradient_error: float,
) -> None:
    scores = cosines(2, rows, columns).requires_grad_()
    upstream = torch.randn(2, rows, columns)
    ours = ops.soft_grouping(scores, r, top_k, *temperatures)
    (our_gradient,) = torch.autograd.grad((ours * upstream).sum(), scores)
    for image in range(2):
        exact = scores[image].detach().double().requires_grad_()
        expected = slow.soft_grouping(exact, r, top_k, *temperatures)
        (gradient,) = torch.autograd.grad((expected * upstream[image]).sum(), exact)
        torch.testing.assert_close(ours[image].double(), expected, atol=value_error, rtol=0)
        assert (our_gradient[image] - gradient).norm() < gradient_error * gradient.norm() + VANISHING


def test_no_round_assigns_nothing() -> None:
    assert not ops.soft_grouping(cosines(2, 5, 4), 0).any()


@pytest.mark.parametrize("r", [1, 16, 49])
def test_grouping_equals_its_definition_at_the_size_of_a_real_layer(r: int) -> None:
    """98 rows, and enough rounds that the suppression of chosen rows reaches its floor."""
    scores = (torch.randn(1, 98, 98) * 0.2 + 0.5).clamp(-1, 1).requires_grad_()
    upstream = torch.randn(98, 98)
    ours = ops.soft_grouping(scores, r)
    (our_gradient,) = torch.autograd.grad((ours[0] * upstream).sum(), scores)
    exact = scores[0].detach().double().requires_grad_()
    expected = slow.soft_grouping(exact, r)
    (gradient,) = torch.autograd.grad((expected * upstream).sum(), exact)
    torch.testing.assert_close(ours[0].double(), expected, atol=2e-5, rtol=0)
    assert (our_gradient[0] - gradient).norm() < 1e-3 * gradient.norm()


@pytest.mark.parametrize("spread", [1e-3, 0.3, 1.0])
@pytest.mark.parametrize("r", [1, 7, 30])
def test_assignments_are_in_the_unit_interval_and_rows_give_at_most_themselves(spread: float, r: int) -> None:
    assignment = ops.soft_grouping(cosines(3, 30, 31) * spread, r)
    assert assignment.dtype == torch.float32
    assert assignment.min() >= 0
    assert assignment.sum(-1).max() <= 1 + 1e-6
    assert ((assignment > 0).sum(-1) <= 3).all()


def test_cold_grouping_chooses_what_hard_matching_chooses() -> None:
    """At an assignment temperature near 0 the relaxation is the thing itself: r rows, wholly into their best."""
    scores = torch.stack([torch.randperm(144) for _ in range(4)]).view(4, 12, 12) / 144 - 0.5  # no two nearly equal
    assignment = ops.soft_grouping(scores, 5, 3, 0.1, 0.0005)
    best, column = scores.max(-1)
    for image in range(4):
        expected = torch.zeros(12, 12)
        for row in best[image].argsort(descending=True)[:5]:
            expected[row, column[image, row]] = 1
        torch.testing.assert_close(assignment[image], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_grouping_of_low_precision_scores_runs_in_float32(dtype: torch.dtype) -> None:
    scores = cosines(2, 9, 9).to(dtype)
    assert torch.equal(ops.soft_grouping(scores, 3), ops.soft_grouping(scores.float(), 3))


@pytest.mark.parametrize("scores", [torch.ones(1, 6, 6), torch.zeros(1, 6, 6), -torch.ones(1, 1, 1)])
@pytest.mark.parametrize("r", [1, 6, 40])
def test_gradients_of_degenerate_scores_are_finite(scores: Tensor, r: int) -> None:
    """Ties everywhere, one row alone, more rounds than rows."""
    scores = scores.clone().requires_grad_()
    assignment = ops.soft_grouping(scores, r)
    (assignment * torch.randn_like(assignment)).sum().backward()
    assert assignment.isfinite().all()
    assert scores.grad is not None and scores.grad.isfinite().all()


def layer(prefix: int, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features, sizes as an earlier soft merge leaves them, and a metric, for two images."""
    metric = torch.randn(2, 1, 6) + torch.randn(2, num_tokens, 6) / 2
    return torch.randn(2, num_tokens, 5), torch.rand(2, num_tokens) * 3 + 0.1, metric


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("active", [16, 17, 20])
@TEMPERATURES
def test_merge_equals_the_slow_reference_with_gradients(
    prefix: int, active: int, temperatures: tuple[float, float], value_error: float, gradient_error: float
) -> None:
    x, sizes, metric = (t.requires_grad_() for t in layer(prefix, 20))
    r = (active - prefix) // 3
    to_x, to_sizes = torch.randn(2, 20, 5), torch.randn(2, 20)
    options = dict(zip(("score_temperature", "assignment_temperature"), temperatures, strict=True))
    new_x, new_sizes = soft_merging(x, sizes, metric, active, r, prefix, top_k=3, **options)
    ours = torch.autograd.grad((new_x * to_x).sum() + (new_sizes * to_sizes).sum(), (x, sizes, metric))
    for image in range(2):
        exact = [t[image].detach().double().requires_grad_() for t in (x, sizes, metric)]
        expected_x, expected_sizes = slow.soft_merge(*exact, active, r, prefix, 3, *temperatures)
        torch.testing.assert_close(new_x[image].double(), expected_x, atol=value_error, rtol=0)
        torch.testing.assert_close(new_sizes[image].double(), expected_sizes, atol=value_error, rtol=0)
        value = (expected_x * to_x[image]).sum() + (expected_sizes * to_sizes[image]).sum()
        for gradient, theirs in zip(ours, torch.autograd.grad(value, exact), strict=True):
            assert (gradient[image] - theirs).norm() < gradient_error * theirs.norm() + VANISHING


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("r", [0, 1, 5, 7])
def test_merge_conserves_mass_and_leaves_the_others_alone(prefix: int, r: int) -> None:
    x, sizes, metric = layer(prefix, 25)
    active = 21
    new_x, new_sizes = soft_merging(x, sizes, metric, active, r, prefix)
    torch.testing.assert_close(new_sizes.sum(1), sizes.sum(1), atol=1e-4, rtol=0)
    before = (sizes.unsqueeze(-1) * x).sum(1)
    torch.testing.assert_close((new_sizes.unsqueeze(-1) * new_x).sum(1), before, atol=1e-4, rtol=0)
    resting = [*range(prefix), *range(active, 25)]
    assert torch.equal(new_x[:, resting], x[:, resting])
    assert torch.equal(new_sizes[:, resting], sizes[:, resting])
    assert torch.equal(new_x[:, prefix:active:2], x[:, prefix:active:2])  # A keeps its features
    assert (new_sizes >= 0).all()


def test_merge_of_empty_tokens_is_finite_with_gradients() -> None:
    """Sizes of exactly 0 on both sides of a match, as rounding makes them."""
    x, sizes, metric = layer(1, 17)
    sizes[:, [2, 3, 4, 7, 8]] = 0
    x, sizes, metric = (t.requires_grad_() for t in (x, sizes, metric))
    new_x, new_sizes = soft_merging(x, sizes, metric, 17, 6)
    gradients = torch.autograd.grad(new_x.square().sum() + new_sizes.square().sum(), (x, sizes, metric))
    assert all(t.isfinite().all() for t in (new_x, new_sizes, *gradients))


def test_a_token_merged_wholly_has_size_zero_and_a_gradient_through_the_clip() -> None:
    """Cold temperatures: 1 - row sum is 0 (or below, by rounding), and its gradient is that of no clip."""
    x, metric = torch.randn(1, 9, 4), torch.randn(1, 9, 4)
    metric[0, 2] = metric[0, 1]
    sizes = torch.ones(1, 9, requires_grad=True)
    metric.requires_grad_()
    _, new_sizes = soft_merging(x, sizes, metric, 9, 2, score_temperature=0.02, assignment_temperature=0.02)
    assert 0 <= new_sizes[0, 1].item() < 1e-5
    (gradient,) = torch.autograd.grad(new_sizes[0, 1], sizes)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("r, fits", [(-1, "0 to 8"), (9, "0 to 8")])
def test_r_that_does_not_fit_is_refused_with_the_range_that_would(r: int, fits: str) -> None:
    x, sizes, metric = layer(1, 20)
    with pytest.raises(ValueError, match=rf"r={r} .*17 active tokens.* 1 are prefix: {fits}"):
        soft_merging(x, sizes, metric, 17, r)


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("active", [16, 17, 20])
def test_size_order_puts_the_active_tokens_by_size(prefix: int, active: int) -> None:
    sizes = torch.rand(4, 20)
    order = ops.size_order(sizes, active, prefix)
    for image in range(4):
        assert order[image].tolist() == slow.sort_by_size(sizes[image], active, prefix)
    by_size = ops.permute_tokens(sizes, order)
    assert (by_size[:, prefix : active - 1] >= by_size[:, prefix + 1 : active]).all()


def test_size_order_is_a_permutation_also_of_equal_sizes() -> None:
    order = ops.size_order(torch.ones(3, 50), 40, 1)
    assert order.sort(dim=-1).values.tolist() == [list(range(50))] * 3
    assert order[:, 0].tolist() == [0] * 3
    assert order[:, 40:].tolist() == [list(range(40, 50))] * 3


def test_size_order_of_equal_sizes_does_not_depend_on_the_batch() -> None:
    sizes = torch.randint(0, 3, (64, 197)).float()
    together = ops.size_order(sizes, 181, 1)
    for image in range(64):
        assert torch.equal(ops.size_order(sizes[image : image + 1], 181, 1)[0], together[image])


def test_permute_moves_features_and_sizes_alike() -> None:
    x, order = torch.randn(2, 6, 3), torch.stack([torch.randperm(6), torch.randperm(6)])
    moved, moved_sizes = ops.permute_tokens(x, order), ops.permute_tokens(x[..., 0], order)
    for image in range(2):
        for position in range(6):
            assert torch.equal(moved[image, position], x[image, order[image, position]])
    assert torch.equal(moved[..., 0], moved_sizes)


def test_assignment_equals_the_authors(oracle: dict[str, Tensor]) -> None:
    assignment = ops.soft_grouping(oracle["soft_scores"], 16, 3, 0.1, 0.1)
    torch.testing.assert_close(assignment, oracle["soft_assign_r16"], atol=1e-4, rtol=0)


def test_two_soft_merges_in_a_row_equal_the_authors(oracle: dict[str, Tensor]) -> None:
    x, sizes = oracle["x"], torch.ones(2, 197)
    for step, (metric, active) in enumerate([(oracle["metric"], 197), (oracle["soft2_metric"], 181)], start=1):
        x, sizes = soft_merging(x, sizes, metric, active, 16)
        order = ops.size_order(sizes, active)
        x, sizes = ops.permute_tokens(x, order), ops.permute_tokens(sizes, order)
        torch.testing.assert_close(x, oracle[f"soft{step}_x"], atol=1e-4, rtol=0)
        torch.testing.assert_close(sizes, oracle[f"soft{step}_size"], atol=1e-4, rtol=0)
