"""The Triton kernels against the plain path: on CUDA where there is one, else in Triton's interpreter on the CPU."""

from itertools import product

import pytest
import torch
from torch import Tensor

from dtem_hf.ops import Matching, bipartite_soft_matching, kernels, merge_tokens, prune_tokens
from dtem_hf.ops.matching import cosine_scores, split_even_odd


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton", reason="Triton is not installed: its wheels are for Linux")
from dtem_hf.ops.triton_kernels import best_partner  # noqa: E402 (needs Triton)


# P and N, odd and even; and more tokens than one tile of the kernel has.
SPLITS = [*product((0, 1, 2, 5), (16, 17)), (1, 197), (5, 300)]


@pytest.fixture
def through_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send the public functions to the kernels, on the CPU too."""
    monkeypatch.setattr(kernels, "devices", ("cpu", "cuda"))


def plain_best_partner(metric: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    return cosine_scores(*split_even_odd(metric, prefix)).max(dim=-1)


def plain_merge(x: Tensor, sizes: Tensor | None, matching: Matching) -> tuple[Tensor, Tensor]:
    """By the plain path, which the CPU takes."""
    on_cpu = Matching(*(index.cpu() for index in matching))
    merged, new_sizes = merge_tokens(x.cpu(), None if sizes is None else sizes.cpu(), on_cpu)
    return merged.to(x.device), new_sizes.to(x.device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("prefix", "tokens"), SPLITS)
def test_best_partner_on_random_tokens(prefix, tokens, dtype):
    metric = torch.randn(2, tokens, 24, device=DEVICE).to(dtype)
    best, partner = best_partner(metric, prefix)
    scores = cosine_scores(*split_even_odd(metric, prefix))
    torch.testing.assert_close(best, scores.max(dim=-1).values, atol=2e-6, rtol=0)
    # The chosen partner has the highest score, up to what two orders of adding differ by.
    torch.testing.assert_close(scores.gather(2, partner.unsqueeze(-1)).squeeze(-1), best, atol=2e-6, rtol=0)
    assert best.dtype == torch.float32 and partner.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("prefix", "tokens"), SPLITS)
def test_ties_go_to_the_same_tokens(prefix, tokens, dtype):
    """Signs of few features: every score is exact in any order of adding, and most rows have several best."""
    metric = (torch.randint(0, 2, (2, tokens, 4), device=DEVICE) * 2.0 - 1).to(dtype)
    scores = cosine_scores(*split_even_odd(metric, prefix))
    assert ((scores == scores.amax(dim=-1, keepdim=True)).sum(dim=-1) > 1).any()
    best, partner = best_partner(metric, prefix)
    expected_best, expected_partner = plain_best_partner(metric, prefix)
    assert torch.equal(best, expected_best) and torch.equal(partner, expected_partner)


def test_tokens_of_no_length_and_wide_metrics():
    metric = torch.randn(1, 20, 200, device=DEVICE)  # wider than one tile
    metric[:, 3:7] = 0
    best, partner = best_partner(metric, 1)
    expected_best, expected_partner = plain_best_partner(metric, 1)
    torch.testing.assert_close(best, expected_best, atol=2e-6, rtol=0)
    assert torch.equal(partner, expected_partner)


def test_a_metric_that_is_a_view():
    whole = torch.randn(2, 30, 64, device=DEVICE)
    assert torch.equal(best_partner(whole[:, :, 16:40], 1)[1], plain_best_partner(whole[:, :, 16:40], 1)[1])


@pytest.mark.parametrize("r", [1, 5, "all"])
@pytest.mark.parametrize(("prefix", "tokens"), SPLITS)
def test_a_matching_is_that_of_tensor_operations(prefix, tokens, r):
    """Signs: every score is exact, and many are equal."""
    metric = torch.randint(0, 2, (3, tokens, 6), device=DEVICE) * 2.0 - 1
    r = (tokens - prefix) // 2 if r == "all" else r
    expected = bipartite_soft_matching(metric.cpu(), r, prefix)
    for found, plain in zip(kernels.match(metric, r, prefix), expected, strict=True):
        assert torch.equal(found.cpu(), plain)


def test_positions_stay_positions_where_scores_are_not_numbers():
    metric = torch.randn(2, 41, 8, device=DEVICE)
    metric[:, ::3] = torch.nan
    leaving, joined, staying = kernels.match(metric, 12, 1)
    for image in range(2):
        assert sorted([*leaving[image].tolist(), *staying[image].tolist()]) == list(range(41))
    assert ((joined >= 1 + 20 - 12) & (joined < 29)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize(("prefix", "tokens"), SPLITS[:8])
def test_merge(prefix, tokens, sized, dtype):
    x = torch.randn(2, tokens, 20, device=DEVICE).to(dtype)
    sizes = torch.randint(1, 9, (2, tokens), device=DEVICE).float() if sized else None
    # Few partners to choose from: several tokens join one.
    matching = bipartite_soft_matching(torch.randint(0, 2, (2, tokens, 2), device=DEVICE).float(), 5, prefix)
    found, found_sizes = kernels.merge_tokens(x, sizes, *matching)
    expected, expected_sizes = plain_merge(x, sizes, matching)
    assert torch.equal(found_sizes, expected_sizes) and found.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(found.float(), expected.float(), atol=tolerance, rtol=tolerance)
    own = matching.staying
    alone = expected_sizes == (1 if sizes is None else sizes.gather(1, own))
    assert 0 < alone.sum() < alone.numel()
    assert torch.equal(found[alone], x.gather(1, own.unsqueeze(-1).expand_as(found))[alone])


def test_merge_of_tokens_of_no_size():
    x, sizes = torch.randn(1, 9, 4, device=DEVICE), torch.zeros(1, 9, device=DEVICE)
    matching = bipartite_soft_matching(torch.randn(1, 9, 4, device=DEVICE), 3)
    found, found_sizes = kernels.merge_tokens(x, sizes, *matching)
    assert torch.equal(found, plain_merge(x, sizes, matching)[0]) and not found_sizes.any()


@pytest.mark.usefixtures("through_kernels")
def test_one_compiled_graph_for_any_batch():
    def step(x: Tensor) -> Tensor:
        matching = bipartite_soft_matching(x, 4)
        merged, sizes = merge_tokens(x, None, matching)
        return merged * sizes.unsqueeze(-1)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (2, 3, 5):
        x = torch.randn(count, 17, 16, device=DEVICE)
        torch.testing.assert_close(compiled(x), step(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.usefixtures("through_kernels")
def test_operators_are_registered_as_torch_wants_them():
    metric = torch.randn(2, 17, 16, device=DEVICE)
    matching = bipartite_soft_matching(metric, 4)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(kernels._match_op, (metric, 4, 1), test_utils=checks)
    torch.library.opcheck(kernels._merge_tokens_op, (metric, None, *matching), test_utils=checks)


def test_the_cpu_never_runs_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 9, 4)
    for name in ("match", "merge_tokens"):
        monkeypatch.setattr(kernels, name, lambda *args: pytest.fail("a kernel ran on the CPU"))
    merged, _ = merge_tokens(x, None, bipartite_soft_matching(x, 2))
    assert merged.shape == (1, 7, 4)


def test_kernels_can_be_switched_off_and_come_back_after_an_error() -> None:
    assert kernels.devices == ("cuda",)
    with pytest.raises(KeyError), kernels.disabled():
        assert not kernels.devices
        raise KeyError
    assert kernels.devices == ("cuda",)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pruning_through_kernels_is_bit_identical(through_kernels: None, dtype: torch.dtype) -> None:
    """ToFu's, which merges with weights of 0 and sizes of width 1."""
    x, sizes = torch.randn(2, 17, 12, device=DEVICE).to(dtype), torch.randint(1, 9, (2, 17), device=DEVICE).float()
    matching = bipartite_soft_matching(torch.randn(2, 17, 8, device=DEVICE), 5, 1)
    ours = prune_tokens(x, sizes, matching)
    with kernels.disabled():
        theirs = prune_tokens(x, sizes, matching)
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
