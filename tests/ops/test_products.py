"""Linear maps by oneDNN: the numbers of `F.linear`, from weights as they lie, and only where nobody misses them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from dtem_hf.ops import products


built = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
here = pytest.mark.skipif(not products.is_available(), reason="MKL is at home on this processor, or not there")


def close(found: Tensor, expected: Tensor) -> None:
    """Within what float32 loses when the sum of as many products is ordered otherwise."""
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@built
@pytest.mark.parametrize("shape", [(1, 1, 48), (2, 33, 48), (181, 384), (3, 5, 7, 50)], ids=str)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("gelu", [None, "none", "tanh"])
def test_equals_linear_and_gelu(shape: tuple[int, ...], biased: bool, gelu: str | None) -> None:
    x, weight = torch.randn(shape), torch.randn(64, shape[-1]) / shape[-1] ** 0.5
    bias = torch.randn(64) if biased else None
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    expected = expected if gelu is None else F.gelu(expected, approximate=gelu)
    found = products.multiply(x, weight, bias, gelu)
    assert found.shape == expected.shape and found.dtype == torch.float32
    close(found, expected.float())


@built
def test_reads_strided_rows_and_weights_and_what_was_written_in_place() -> None:
    x, weight = torch.randn(2, 60, 80)[:, ::2, 10:58], (torch.randn(48, 64) / 7).t()
    close(products.multiply(x, weight, None), F.linear(x, weight))
    weight.data.mul_(-2)
    close(products.multiply(x, weight, None), F.linear(x, weight))
    for bias in (torch.randn(128)[::2], torch.randn(1).expand(64)):
        close(products.multiply(x, weight, bias), F.linear(x, weight, bias))


@here
@torch.no_grad()
def test_stands_aside_where_it_is_not_exact_or_not_seen() -> None:
    x = torch.randn(2, 10, 8)
    assert products.can_multiply(x)
    assert not products.can_multiply(x.bfloat16()) and not products.can_multiply(x.double())
    assert not products.can_multiply(torch.nn.Parameter(x))
    with torch.enable_grad():
        assert not products.can_multiply(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not products.can_multiply(x)
    with FlopCounterMode(display=False):
        assert not products.can_multiply(x)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not products.can_multiply(x)
    with torch.autograd.forward_ad.dual_level():
        assert not products.can_multiply(x)
    seen: list[bool] = []
    torch.func.vmap(lambda y: (seen.append(products.can_multiply(y)), y)[1])(x)
    assert seen == [False]


def test_few_and_small_are_left_to_linear() -> None:
    def faster(rows: int, out: int, width: int) -> bool:
        return products.is_faster(torch.empty(1, rows, width), torch.empty(out, width))

    assert faster(100, 768, 192) and faster(30, 1536, 384) and faster(5, 3072, 768) and faster(16 * 100, 1536, 384)
    assert not faster(20, 768, 192) and not faster(1, 3072, 768) and not faster(100, 192, 192)
    assert not faster(10_000, 64, 768)  # the learned embedding


def test_the_environment_can_forbid_it() -> None:
    script = "from dtem_hf.ops import products; print(products.is_available())"
    environment = {**os.environ, "DTEM_HF_NATIVE": "0"}
    told = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "False"
