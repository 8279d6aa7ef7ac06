"""The size bias against attention whose exponentials are multiplied by the sizes, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dtem_hf import ops
from tests.support import slow_reference as slow


def biased_attention(q: Tensor, k: Tensor, v: Tensor, sizes: Tensor) -> Tensor:
    """As a backbone runs it: [B, H, N, d], sizes [B, N] -> [B, H, N, d]."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=ops.size_bias(sizes, q.dtype))


def multiplied_attention(q: Tensor, k: Tensor, v: Tensor, sizes: Tensor) -> Tensor:
    """The definition, in float64, image by image and head by head."""
    images = []
    for image in range(q.shape[0]):
        heads = [
            slow.attention(*(t[image, h].double() for t in (q, k, v)), 1, q.shape[-1] ** -0.5, sizes[image].double())
            for h in range(q.shape[1])
        ]
        images.append(torch.stack(heads))
    return torch.stack(images)


def inputs(dtype: torch.dtype = torch.float32, num_tokens: int = 12) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(2, 3, num_tokens, 8, dtype=dtype) for _ in range(3))
    return q, k, v, torch.randint(1, 9, (2, num_tokens)).float()


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def test_bias_is_log_sizes_on_the_keys() -> None:
    sizes = torch.tensor([[1.0, 2.0, 7.5]])
    bias = ops.size_bias(sizes, torch.float32)
    assert bias.shape == (1, 1, 1, 3)
    torch.testing.assert_close(bias.flatten().exp(), sizes[0], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-6)])
@pytest.mark.parametrize("empty", [[], [3, 5, 11]], ids=["no empty token", "empty tokens"])
def test_attention_and_all_gradients_are_exact(dtype: torch.dtype, tolerance: float, empty: list[int]) -> None:
    """Also for sizes of exactly 0, where log m has no gradient and the definition does."""
    q, k, v, sizes = inputs(dtype)
    sizes[:, empty] = 0
    ours_in = [t.requires_grad_() for t in (q, k, v, sizes)]
    upstream = torch.randn(q.shape, dtype=torch.float64)
    out = biased_attention(*ours_in)
    ours = torch.autograd.grad((out.double() * upstream).sum(), ours_in)
    expected_out = multiplied_attention(*ours_in)
    theirs = torch.autograd.grad((expected_out * upstream).sum(), ours_in)
    assert relative_error(out, expected_out) < tolerance
    for gradient, expected in zip(ours, theirs, strict=True):
        assert relative_error(gradient, expected) < 5 * tolerance
    for token in empty:
        assert relative_error(ours[3][:, token], theirs[3][:, token]) < 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("zeros", [1, 11], ids=["one empty token", "all but one"])
def test_empty_tokens_leave_everything_finite(dtype: torch.dtype, zeros: int) -> None:
    q, k, v, sizes = inputs(dtype)
    sizes[:, 1 : 1 + zeros] = 0
    ours_in = [t.requires_grad_() for t in (q, k, v, sizes)]
    out = biased_attention(*ours_in)
    gradients = torch.autograd.grad(out.float().square().sum(), ours_in)
    assert out.dtype == dtype
    assert all(t.isfinite().all() for t in (out, *gradients))


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
def test_low_precision_gradients_of_sizes_are_those_of_float32(dtype: torch.dtype, tolerance: float) -> None:
    """Within what the dtype resolves, also for an empty token."""
    q, k, v, sizes = inputs(dtype, num_tokens=6)
    sizes[:, 4] = 0
    gradients = []
    for cast in (dtype, torch.float32):
        leaf = sizes.clone().requires_grad_()
        out = biased_attention(q.to(cast), k.to(cast), v.to(cast), leaf)
        gradients.append(torch.autograd.grad(out.float()[..., 0].sum(), leaf)[0])
    assert relative_error(gradients[0], gradients[1]) < tolerance
    assert relative_error(gradients[0][:, 4], gradients[1][:, 4]) < 5 * tolerance


@pytest.mark.parametrize("dtype, weight", [(torch.float32, 1e-6), (torch.bfloat16, 1e-4), (torch.float16, 1e-2)])
def test_an_empty_token_weighs_next_to_nothing(dtype: torch.dtype, weight: float) -> None:
    """Behind equal keys, a token's share of attention is its size over the sum of sizes."""
    sizes = torch.ones(1, 12)
    sizes[0, 5] = 0
    q = k = torch.zeros(1, 1, 12, 8, dtype=dtype)
    v = torch.zeros(1, 1, 12, 1, dtype=dtype)
    v[0, 0, 5] = 1
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=ops.size_bias(sizes, dtype))
    assert 0 <= out.max().item() < weight / 11


EXPONENTS = torch.tensor([1.7, 0.4, -0.3])  # of three heads


def multiplied_by_powers(q: Tensor, k: Tensor, v: Tensor, sizes: Tensor, exponents: Tensor) -> Tensor:
    """The definition: head by head, exponentials times sizes to the head's power; a token of no size has none."""
    heads = []
    for h in range(q.shape[1]):
        counted = torch.where(sizes > 0, sizes.clamp(min=1e-300) ** exponents[h], sizes)
        heads.append(multiplied_attention(q[:, h : h + 1], k[:, h : h + 1], v[:, h : h + 1], counted))
    return torch.cat(heads, dim=1)


@pytest.mark.parametrize("empty", [[], [3, 5, 11]], ids=["no empty token", "empty tokens"])
def test_powers_of_sizes_and_all_gradients_are_exact(empty: list[int]) -> None:
    """Those of exponents, too. What an empty token would gain by growing is nothing that a power says."""
    q, k, v, sizes = inputs()
    sizes[:, empty] = 0
    real = [i for i in range(12) if i not in empty]
    leaves = [t.requires_grad_() for t in (q, k, v, sizes, EXPONENTS.clone())]
    bias = ops.size_bias(leaves[3], torch.float32, leaves[4])
    assert bias.shape == (2, 3, 1, 12)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    upstream = torch.randn(out.shape, dtype=torch.float64)
    ours = torch.autograd.grad((out.double() * upstream).sum(), leaves)
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    expected = multiplied_by_powers(*doubles)
    theirs = torch.autograd.grad((expected * upstream).sum(), doubles)
    assert relative_error(out, expected) < 1e-6
    for place, (gradient, wanted) in enumerate(zip(ours, theirs, strict=True)):
        if place == 3:
            gradient, wanted = gradient[:, real], wanted[:, real]
        assert relative_error(gradient, wanted) < 5e-6, place
    assert all(gradient.isfinite().all() for gradient in ours)


def test_powers_of_one_are_the_sizes_themselves() -> None:
    sizes = torch.rand(2, 12) * 5
    sizes[:, 4] = 0
    bias = ops.size_bias(sizes, torch.float32, torch.ones(3))
    assert torch.equal(bias, ops.size_bias(sizes, torch.float32).expand(-1, 3, -1, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_empty_token_is_empty_to_any_power(dtype: torch.dtype) -> None:
    """To the power of 0.1, float16's smallest size would be 0.4 of a patch; to a negative one, thousands of them."""
    sizes = torch.tensor([[1.0, 0.0, 3.0]])
    bias = ops.size_bias(sizes, dtype, torch.tensor([1.0, 0.1, 0.0, -2.0]))
    assert bias.dtype == dtype and bias.isfinite().all()
    assert torch.equal(bias[0, :, 0, 1], ops.size_bias(sizes, dtype)[0, 0, 0, 1].expand(4))
    torch.testing.assert_close(
        bias[0, :, 0, 2].float(), torch.tensor([1.0, 0.1, 0.0, -2.0]) * torch.tensor(3.0).log(), atol=1e-2, rtol=1e-2
    )


def extended_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scaling: float) -> Tensor:
    extended = ops.extend_keys(query, key, value, bias, scaling)
    return F.scaled_dot_product_attention(*extended, scale=scaling)[..., : value.shape[-1]]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize("dim", [8, 20, 64])
@pytest.mark.parametrize("exponents", [None, [0.5, 1.0, 2.0]])
def test_mask_and_extended_keys_are_the_definition(
    dtype: torch.dtype, tolerance: float, dim: int, exponents: list[float] | None
) -> None:
    """Of powers of sizes, and for queries that are fewer than keys."""
    q, k, v = (torch.randn(2, 3, 30, dim).to(dtype) for _ in range(3))
    sizes, scaling = torch.randint(1, 200, (2, 30)).float(), dim**-0.5
    powers = torch.tensor(exponents or [1.0] * 3)
    bias = ops.size_bias(sizes, torch.float32, None if exponents is None else powers)
    scores = q.double() @ k.double().transpose(2, 3) * scaling
    weights = scores.exp() * sizes.double()[:, None, None, :] ** powers.double()[:, None, None]
    expected = (weights / weights.sum(dim=-1, keepdim=True) @ v.double())[:, :, :7]
    q = q[:, :, :7]
    masked = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(dtype), scale=scaling)
    for found, bound in ((masked, 2 * tolerance), (extended_attention(q, k, v, bias, scaling), tolerance)):
        assert found.dtype == dtype and found.shape == (2, 3, 7, dim)
        assert relative_error(found, expected) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_padding_counts_for_nothing_in_extended_keys(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, 3, 10, 64).to(dtype) for _ in range(3))
    bias = torch.zeros(2, 1, 1, 10, dtype=dtype)
    bias[:, :, :, 6:] = torch.finfo(dtype).min
    found = extended_attention(q, k, v, bias, 0.125)
    expected = F.scaled_dot_product_attention(q, k[:, :, :6], v[:, :, :6], scale=0.125)
    torch.testing.assert_close(found, expected, atol=1e-2 if dtype != torch.float32 else 1e-6, rtol=1e-2)
