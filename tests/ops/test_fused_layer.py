"""A layer as one call of C, against the same layer of tensor operations in float64; and when it stands aside."""

from __future__ import annotations

import ctypes
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from dtem_hf import ops
from dtem_hf.ops import compiled as compiled_library
from dtem_hf.ops import fused_layer, native
from dtem_hf.ops.fused_layer import ACTIVATIONS, Affine, LayerWeights, MergePart


compiled = pytest.mark.skipif(not fused_layer.is_available(), reason="needs a C compiler, wide vectors and OpenMP")
FUNCTIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


@dataclass
class Shape:
    """What a random layer looks like."""

    heads: int = 3
    dim: int = 16
    width: int = 48
    grown: int = 96
    biased: bool = True
    scaled: bool = False
    activation: str = "gelu"
    eps: float = 1e-6
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def affine(self, out: int, width: int | None = None) -> Affine:
        def drawn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=self.generator)

        bias = drawn(out) * 0.3 if self.biased else None
        if width is None:
            return Affine(1 + drawn(out) * 0.2, bias)
        return Affine(drawn(out, width) / width**0.5, bias)

    def weights(self) -> LayerWeights:
        inner = self.heads * self.dim
        scales = [torch.rand(self.width, generator=self.generator) + 0.5 if self.scaled else None for _ in range(2)]
        return LayerWeights(
            self.affine(self.width),
            *(self.affine(inner, self.width) for _ in range(3)),
            self.affine(self.width, inner),
            self.affine(self.width),
            self.affine(self.grown, self.width),
            self.affine(self.width, self.grown),
            *scales,
            heads=self.heads,
            scaling=self.dim**-0.5,
            norm1_eps=self.eps,
            norm2_eps=self.eps,
            activation=self.activation,
        )


def reference(
    x: Tensor,
    weights: LayerWeights,
    sizes: Tensor | None = None,
    bias: Tensor | None = None,
    merge: MergePart | None = None,
    num_rows: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The definition in float64; the matching is the plain path's own, by the metric in float32."""
    x, width, rows = x.to(dtype), x.shape[-1], x.shape[1] if num_rows is None else num_rows

    def wide(tensor: Tensor | None) -> Any:
        return None if tensor is None else tensor.to(dtype)

    def linear(x: Tensor, part: Affine) -> Tensor:
        return F.linear(x, wide(part.weight), wide(part.bias))

    def norm(x: Tensor, part: Affine, eps: float) -> Tensor:
        return F.layer_norm(x, (width,), wide(part.weight), wide(part.bias), eps)

    normed = norm(x, weights.norm1, weights.norm1_eps)
    query, key, value = (linear(normed, part) for part in (weights.query, weights.key, weights.value))
    heads = [part.unflatten(-1, (weights.heads, -1)).transpose(1, 2) for part in (query, key, value)]
    scores = heads[0] @ heads[1].transpose(2, 3) * weights.scaling + (0 if bias is None else wide(bias))
    mixed = linear((scores.softmax(dim=-1) @ heads[2]).transpose(1, 2).flatten(2), weights.output)
    x = (x + mixed * (1 if weights.scale1 is None else wide(weights.scale1)))[:, :rows]
    left: tuple[Tensor, ...] = ()
    if merge is not None:
        metric = ops.add_heads(key, weights.heads) if merge.embedding is None else linear(normed, merge.embedding)
        matching = ops.bipartite_soft_matching(metric.float(), merge.r, merge.num_prefix_tokens)
        before = x
        x, summed = merged_in_double(before, sizes, matching)
        if merge.norm_power is not None:
            lengths = merged_in_double(before.norm(dim=-1, keepdim=True), sizes, matching)[0]
            x = x * (lengths / x.norm(dim=-1, keepdim=True)) ** wide(merge.norm_power)
        left = (summed, *matching[:3])
    grown = FUNCTIONS[weights.activation](linear(norm(x, weights.norm2, weights.norm2_eps), weights.grow))
    x = x + linear(grown, weights.shrink) * (1 if weights.scale2 is None else wide(weights.scale2))
    return x, left


def merged_in_double(x: Tensor, sizes: Tensor | None, matching: ops.Matching) -> tuple[Tensor, Tensor]:
    """Size-weighted means, token by token: x [B, N, D] in float64."""
    prefix, images, summed = matching.num_prefix_tokens, [], []
    for i, image in enumerate(x):
        weights = torch.ones(len(image)) if sizes is None else sizes[i]
        first_a, first_b = prefix + prefix % 2, prefix + 1 - prefix % 2
        groups = [[j] for j in range(prefix)]
        groups += [[first_a + 2 * int(j)] for j in matching.kept[i]]
        partners: dict[int, list[int]] = {}
        for a, b in zip(matching.merged[i].tolist(), matching.target[i].tolist(), strict=True):
            partners.setdefault(b, []).append(first_a + 2 * a)
        num_b = len(range(first_b, len(image), 2))
        groups += [[first_b + 2 * j, *partners.get(j, [])] for j in range(num_b)]
        images.append(torch.stack([(image[g] * weights[g, None]).sum(0) / weights[g].sum() for g in groups]))
        summed.append(torch.stack([weights[g].sum() for g in groups]))
    return torch.stack(images), torch.stack(summed)


def assert_equals_reference(x: Tensor, weights: LayerWeights, **options: object) -> None:
    with torch.no_grad():
        found, merged = fused_layer.run(x, weights, **options)  # type: ignore[arg-type]
        expected, left = reference(x, weights, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected.float(), atol=1e-5, rtol=1e-5)
    assert (merged is not None) == bool(left)
    if merged is not None:
        for ours, theirs in zip((merged.sizes, *merged.matching()[:3]), left, strict=True):
            assert torch.equal(ours, theirs)
        torch.testing.assert_close(merged.bias, ops.size_bias(left[0], torch.float32), atol=1e-6, rtol=1e-6)


@pytest.fixture(params=[1, 2, 3], ids=lambda n: f"{n} threads")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def drawn(batch: int, num_tokens: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch + num_tokens)
    sizes = torch.randint(1, 9, (batch, num_tokens), generator=generator).float()
    return torch.randn(batch, num_tokens, width, generator=generator), sizes, sizes.log()[:, None, None, :]


SHAPES = {
    "even": Shape(),
    "odd widths": Shape(heads=3, dim=7, width=21, grown=45),
    "no biases, scales": Shape(biased=False, scaled=True),
    "attention wider than tokens": Shape(heads=4, dim=32, width=40, grown=24, scaled=True),
    "one head": Shape(heads=1, dim=64, width=72, grown=200),
    "gelu_tanh": Shape(activation="gelu_tanh"),
    "quick_gelu": Shape(activation="quick_gelu", heads=2, dim=72, width=144, grown=577),
}


@compiled
@pytest.mark.parametrize("batch, num_tokens, r", [(1, 197, 16), (5, 50, 13), (3, 16, 5), (2, 12, 3), (4, 33, 0)])
@pytest.mark.parametrize("name", SHAPES)
def test_equals_the_definition(name: str, batch: int, num_tokens: int, r: int, threads: int) -> None:
    shape = SHAPES[name]
    x, sizes, bias = drawn(batch, num_tokens, shape.width)
    merge = MergePart(r, 1) if r else None
    assert_equals_reference(x, shape.weights(), sizes=sizes, bias=bias, merge=merge)


@compiled
@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("num_tokens, r", [(40, 1), (41, 17), (198, 96), (17, 3), (77, 36), (7, 1)])
def test_prefix_tokens_and_odd_numbers_of_tokens(prefix: int, num_tokens: int, r: int) -> None:
    r = min(r, (num_tokens - prefix) // 2)
    for sized in (True, False):
        x, sizes, bias = drawn(3, num_tokens, 48)
        options = {"sizes": sizes, "bias": bias} if sized else {}
        assert_equals_reference(x, Shape().weights(), merge=MergePart(r, prefix), **options)


@compiled
@pytest.mark.parametrize("embed_dim", [64, 24, 5])
def test_a_learned_embedding_compares(embed_dim: int, threads: int) -> None:
    shape = Shape()
    weights, embedding = shape.weights(), shape.affine(embed_dim, shape.width)
    x, sizes, bias = drawn(3, 61, shape.width)
    assert_equals_reference(x, weights, sizes=sizes, bias=bias, merge=MergePart(20, 1, embedding))
    by_keys = fused_layer.run(x, weights, merge=MergePart(20, 1))[1]
    by_embedding = fused_layer.run(x, weights, merge=MergePart(20, 1, embedding))[1]
    assert by_keys is not None and by_embedding is not None
    assert not torch.equal(by_keys.sizes, by_embedding.sizes)


@compiled
@pytest.mark.parametrize("power", [0.0, 0.4, 1.0, -0.5])
def test_means_get_length_back(power: float, threads: int) -> None:
    x, sizes, bias = drawn(3, 61, 48)
    merge = MergePart(25, 1, norm_power=torch.tensor([power]))
    assert_equals_reference(x, Shape().weights(), sizes=sizes, bias=bias, merge=merge)


@compiled
@pytest.mark.parametrize("num_rows", [1, 2, 5, 17])
def test_rows_that_are_read_alone(num_rows: int, threads: int) -> None:
    x, _, bias = drawn(3, 45, 48)
    assert_equals_reference(x, Shape(scaled=True).weights(), bias=bias, num_rows=num_rows)


@compiled
def test_a_merge_of_no_tokens_is_none() -> None:
    x, sizes, bias = drawn(2, 20, 48)
    assert_equals_reference(x, Shape().weights(), sizes=sizes, bias=bias)
    found, merged = fused_layer.run(x, Shape().weights(), sizes, bias, MergePart(0, 1))
    assert merged is None and torch.equal(found, fused_layer.run(x, Shape().weights(), sizes, bias)[0])


@compiled
def test_bias_by_head_for_all_images_and_strided_tokens() -> None:
    x, sizes, _ = drawn(3, 45, 48)
    wide = torch.randn(3, 90, 100)
    wide[:, ::2, 20:68] = x
    x = wide[:, ::2, 20:68]
    assert_equals_reference(x.transpose(1, 2).contiguous().transpose(1, 2), Shape().weights(), merge=MergePart(9, 1))
    for bias in (torch.randn(1, 3, 1, 45), torch.randn(3, 3, 1, 45), torch.randn(1, 1, 1, 45).expand(3, 3, 1, 45)):
        assert_equals_reference(x, Shape().weights(), bias=bias, merge=MergePart(9, 1), sizes=sizes[:1].expand(3, -1))


@compiled
def test_batch_and_threads_do_not_change_a_bit(threads: int) -> None:
    shape, generator = Shape(heads=3, dim=64, width=192, grown=768), torch.Generator().manual_seed(0)
    x, weights, merge = torch.randn(5, 101, 192, generator=generator), shape.weights(), MergePart(16, 1)
    together, merged = fused_layer.run(x, weights, merge=merge)
    assert merged is not None
    for i in range(5):
        alone, merged_alone = fused_layer.run(x[i : i + 1], weights, merge=merge)
        assert torch.equal(alone[0], together[i]) and merged_alone is not None
        for ours, theirs in zip(merged_alone.matching()[:3], merged.matching()[:3], strict=True):
            assert torch.equal(ours[0], theirs[i])
    torch.set_num_threads(1)
    assert torch.equal(fused_layer.run(x, weights, merge=merge)[0], together)


@compiled
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_ties_go_to_the_lower_position_whatever_the_batch(prefix: int, threads: int) -> None:
    """Seven different tokens, repeated, at odd places of vectors: equal tokens have equal scores to the last bit."""
    shape = Shape(heads=2, dim=20, width=33)
    kinds = torch.randn(7, 33, generator=torch.Generator().manual_seed(1))
    x = kinds[torch.randint(7, (4, 61), generator=torch.Generator().manual_seed(2))]
    _, merged = fused_layer.run(x, shape.weights(), merge=MergePart(22, prefix))
    assert merged is not None
    matching = merged.matching()
    first_a, first_b = prefix + prefix % 2, prefix + 1 - prefix % 2
    for image in range(4):
        a, b = x[image, first_a::2], x[image, first_b::2]
        chosen, target = matching.merged[image].tolist(), matching.target[image].tolist()
        for row, column in zip(chosen, target, strict=True):
            same = (b == a[row]).all(dim=1).nonzero().flatten().tolist()
            assert not same or column == same[0]
        assert matching.kept[image].tolist() == sorted(set(range(len(a))) - set(chosen))


@compiled
def test_activations_are_those_of_torch_everywhere() -> None:
    """Behind a norm of one feature pair, grown tokens sweep the real line."""
    sweep = torch.cat([torch.linspace(-30, 30, 4000), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 500.0, -500.0, 3e4])])
    for activation in ACTIVATIONS:
        shape = Shape(heads=1, dim=8, width=2, grown=len(sweep), activation=activation)
        weights = shape.weights()
        zero = Affine(torch.zeros(2, 8), torch.zeros(2))
        # The MLP reads nothing but its own bias, and adds one grown feature after the other.
        grow = Affine(torch.zeros(len(sweep), 2), sweep)
        for at in range(0, len(sweep), 997):
            shrink = torch.zeros(2, len(sweep))
            shrink[0, at] = 1
            changed = weights._replace(output=zero, grow=grow, shrink=Affine(shrink, None))
            found, _ = fused_layer.run(torch.zeros(1, 3, 2), changed)
            expected = FUNCTIONS[activation](sweep[at].double())
            torch.testing.assert_close(found[0, 0, 0].double(), expected, atol=4e-7, rtol=4e-7)


@compiled
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_seen_in_what_comes_out(value: float) -> None:
    x, sizes, bias = drawn(2, 40, 48)
    x[0, 7, 3] = value
    out, merged = fused_layer.run(x, Shape().weights(), sizes=sizes, bias=bias, merge=MergePart(9, 1))
    assert out[0].isnan().all() and out[1].isfinite().all()  # all tokens attend to the one
    assert merged is not None and torch.equal(merged.sizes.sum(1), sizes.sum(1))
    matching = merged.matching()
    both = torch.cat([matching.merged, matching.kept], dim=1)
    assert torch.equal(both.sort(dim=1).values, torch.arange(19).expand(2, -1))


@compiled
def test_scores_of_any_height_and_tokens_that_do_not_count() -> None:
    x, sizes, _ = drawn(1, 40, 48)
    weights = Shape().weights()
    sizes[0, 9] = 0
    bias = ops.size_bias(sizes, torch.float32)
    assert_equals_reference(x, weights, bias=bias)
    # Scores of hundreds have lost digits before they are in an exponent: no more than tensor operations lose.
    for layer, added, most in ((weights, -300, 5e-5), (weights._replace(scaling=40.0), 0, 1e-3)):
        exact, _ = reference(x, layer, bias=bias + added)
        plain, _ = reference(x, layer, bias=bias + added, dtype=torch.float32)
        found, _ = fused_layer.run(x, layer, bias=bias + added)
        assert (found - exact).abs().max() < 3 * (plain - exact).abs().max() < most


@pytest.mark.parametrize("eps", [1e-6, 1e-12])
@torch.no_grad()
def test_tokens_that_are_nearly_the_same_throughout_and_far_from_0(eps: float) -> None:
    """Whose norm divides what rounding left of them, if the mean was not exact: as exact as tensor operations."""
    layer = Shape(heads=6, dim=32, width=192, grown=384, eps=eps).weights()
    spread = torch.randn(1, 30, 192, generator=torch.Generator().manual_seed(0))
    for x in (torch.full((1, 30, 192), 1.1), torch.full((1, 30, 192), 1000.3), spread + 100, spread + 1000):
        exact, _ = reference(x, layer)
        plain, _ = reference(x, layer, dtype=torch.float32)
        found, _ = fused_layer.run(x, layer)
        assert (found - exact).abs().max() < 3 * (plain - exact).abs().max() + 1e-6


@torch.no_grad()
def test_long_sums_lose_no_more_than_shorter_ones() -> None:
    """A sum of 4,096 products, one after the other, would lose twice as much."""
    layer = Shape(heads=16, dim=64, width=1024, grown=4096).weights()
    x = torch.randn(1, 20, 1024, generator=torch.Generator().manual_seed(0))
    exact, _ = reference(x, layer)
    assert (fused_layer.run(x, layer)[0] - exact).norm() < 5e-7 * exact.norm()


@pytest.mark.parametrize("target", ["-march=haswell", "-march=x86-64"])
@pytest.mark.skipif(platform.machine() != "x86_64" or shutil.which("cc") is None, reason="needs cc on x86-64")
def test_other_widths_of_vectors(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AVX2, and what every processor has, beside what this one has."""
    if target == "-march=haswell" and "avx2" not in torch.backends.cpu.get_cpu_capability().lower().replace(
        "512", "2"
    ):
        pytest.skip("this processor has no AVX2")
    library = ctypes.CDLL(str(compiled_library._compile(["cc"], [target], tmp_path / "other.so")))
    for module in (fused_layer, native):
        monkeypatch.setattr(module, "library", lambda: library)
        monkeypatch.setattr(module, "_functions", module._functions.__wrapped__)
    monkeypatch.setattr(native, "_scratch_bytes", native._scratch_bytes.__wrapped__)
    for name in ("even", "odd widths", "quick_gelu"):
        for batch, num_tokens, r in ((1, 57, 16), (5, 50, 13), (4, 33, 0), (2, 12, 3)):
            x, sizes, bias = drawn(batch, num_tokens, SHAPES[name].width)
            merge = MergePart(r, 1) if r else None
            assert_equals_reference(x, SHAPES[name].weights(), sizes=sizes, bias=bias, merge=merge)
    x, sizes, _ = drawn(3, 57, 48)
    found = native.match_and_merge(x, sizes, x, 3, 20, 1)
    expected = ops.merge_tokens(x, sizes, ops.bipartite_soft_matching(ops.add_heads(x, 3), 20, 1))
    assert torch.equal(found.sizes, expected[1])
    torch.testing.assert_close(found.x, expected[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@compiled
def test_stands_aside_where_it_is_not_exact_or_not_seen() -> None:
    x = torch.randn(2, 10, 8)
    assert fused_layer.can_run(x)
    assert not fused_layer.can_run(x.bfloat16()) and not fused_layer.can_run(x.double())
    assert not fused_layer.can_run(torch.nn.Parameter(x)) and not fused_layer.can_run(x[:0])
    with torch.enable_grad():
        assert not fused_layer.can_run(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not fused_layer.can_run(x)
    with FlopCounterMode(display=False):
        assert not fused_layer.can_run(x)
    with torch.autograd.forward_ad.dual_level():
        assert not fused_layer.can_run(x)
    seen: list[bool] = []
    torch.func.vmap(lambda y: (seen.append(fused_layer.can_run(y)), y)[1])(x)
    assert seen == [False]
