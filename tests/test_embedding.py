"""The decoupled embedding's initialisations, against loops over heads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dtem_hf.embedding import (
    DecoupledEmbedding,
    EmbeddingShape,
    Geometry,
    KeyProjection,
    default_embed_dim,
    initialize_from_keys,
    initialize_randomly,
    mean_key_projection,
)
from dtem_hf.errors import BadValue
from dtem_hf.ops import norms_of


def projection(heads: int, head_dim: int, width: int, bias: bool = True) -> KeyProjection:
    return KeyProjection(torch.randn(heads * head_dim, width), torch.randn(heads * head_dim) if bias else None, heads)


def keys_of_head(keys: KeyProjection, h: Tensor, head: int) -> Tensor:
    rows = slice(head * keys.head_dim, (head + 1) * keys.head_dim)
    out = h @ keys.weight[rows].T
    return out if keys.bias is None else out + keys.bias[rows]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "heads, embed_dim, groups",
    [
        (4, None, [[0, 1, 2, 3]]),
        (4, 6, [[0, 1, 2, 3]]),
        (4, 12, [[0, 1], [2, 3]]),
        (3, 12, [[0, 1], [2]]),
        (4, 24, [[0], [1], [2], [3]]),
        (1, 6, [[0]]),
    ],
)
def test_key_mean_is_the_mean_key_of_each_group_of_heads(
    heads: int, embed_dim: int | None, groups: list[list[int]], bias: bool
) -> None:
    keys, h = projection(heads, 6, 10, bias), torch.randn(7, 10)
    weight, offset = mean_key_projection(keys, embed_dim)
    expected = [sum(keys_of_head(keys, h, head) for head in group) / len(group) for group in groups]
    torch.testing.assert_close(h @ weight.T + offset, torch.cat(expected, dim=-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("embed_dim", [1, 5, 7, 13, 30])
def test_a_width_that_heads_do_not_fill_says_which_would(embed_dim: int) -> None:
    with pytest.raises(BadValue, match=rf"embed_dim={embed_dim}: init='keys' needs a multiple of 6, from 6 to 24"):
        mean_key_projection(projection(4, 6, 10), embed_dim)


@pytest.mark.parametrize(
    "hidden_size, head_dim, expected", [(192, 64, 64), (1023, 33, 33), (1024, 64, 128), (1664, 104, 208)]
)
def test_default_width_doubles_from_1024_on(hidden_size: int, head_dim: int, expected: int) -> None:
    assert default_embed_dim(Geometry(2, hidden_size, 3, head_dim, 1)) == expected


def test_every_layer_takes_its_own_keys() -> None:
    embedding = DecoupledEmbedding(EmbeddingShape(3, 10, 6))
    keys = [projection(4, 6, 10) for _ in range(3)]
    initialize_from_keys(embedding, keys)
    assert list(embedding.adapter_tensors()) == [f"layers.{i}.{part}" for i in range(3) for part in ("weight", "bias")]
    for layer, theirs in zip(embedding.projections, keys, strict=True):
        weight, bias = mean_key_projection(theirs)
        assert torch.equal(layer.weight, weight)
        assert torch.equal(layer.bias, bias)
        assert layer.weight.requires_grad


def test_another_number_of_layers_is_refused() -> None:
    with pytest.raises(ValueError):
        initialize_from_keys(DecoupledEmbedding(EmbeddingShape(3, 10, 6)), [projection(4, 6, 10)] * 2)


def test_random_initialisation_has_the_given_deviation_and_no_bias() -> None:
    embedding = DecoupledEmbedding(EmbeddingShape(2, 100, 50))
    initialize_randomly(embedding, std=0.3)
    first, second = embedding.projections
    assert first.weight.std().item() == pytest.approx(0.3, rel=0.05)
    assert abs(first.weight.mean().item()) < 0.02
    assert not first.bias.any()
    assert not torch.equal(first.weight, second.weight)


@pytest.mark.parametrize("heads", [0, 4])
@pytest.mark.parametrize("norms", [False, True])
def test_a_shape_says_which_tensors_there_are_and_what_they_start_at(heads: int, norms: bool) -> None:
    shape = EmbeddingShape(3, 10, 6, heads, norms)
    embedding = DecoupledEmbedding(shape)
    assert {name: list(tensor.shape) for name, tensor in embedding.adapter_tensors().items()} == shape.tensors()
    assert {id(tensor) for tensor in embedding.adapter_tensors().values()} == {id(p) for p in embedding.parameters()}
    aggregation = list(embedding.aggregation_parameters())
    assert len(aggregation) == 3 * (bool(heads) + norms)
    for initialize in (
        lambda: initialize_from_keys(embedding, [projection(4, 6, 10)] * 3),
        lambda: initialize_randomly(embedding, std=0.3),
    ):
        for parameter in aggregation:
            parameter.data.fill_(7)
        initialize()
        for name, parameter in embedding.adapter_tensors().items():
            if not name.startswith("layers"):
                assert torch.equal(parameter, torch.full_like(parameter, float(name.startswith("exponents"))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_means_are_lengthened_token_by_token(dtype: torch.dtype) -> None:
    """And those of one token, whose mean length is their own, stay bit for bit; a mean of nothing stays nothing."""
    embedding = DecoupledEmbedding(EmbeddingShape(2, 8, 6, norms=True)).to(dtype)
    embedding.reset_aggregation()
    embedding.norms[1].value.data.fill_(0.375)
    x = torch.randn(2, 5, 8).to(dtype)
    x[1, 4] = 0
    norms = norms_of(x)
    norms[0, 1], norms[1, 2] = 9.0, 5.0
    found = embedding.lengthen(1, x, lambda: norms)
    assert found.dtype == dtype and torch.equal(embedding.lengthen(0, x, lambda: norms), x)
    for image in range(2):
        for token in range(5):
            if (image, token) in ((0, 1), (1, 2)):
                row = x[image, token].double()
                expected = row * (norms[image, token].double() / row.norm()) ** 0.375
                tolerance = torch.finfo(dtype).eps
                torch.testing.assert_close(found[image, token].double(), expected, atol=0, rtol=2 * tolerance)
            else:
                assert torch.equal(found[image, token], x[image, token])


def test_without_norms_nothing_is_computed() -> None:
    embedding, x = DecoupledEmbedding(EmbeddingShape(2, 8, 6, exponent_heads=2)), torch.randn(1, 3, 8)
    called: list[int] = []

    def norms() -> Tensor:
        called.append(1)
        return norms_of(x)

    assert embedding.lengthen(0, x, norms) is x
    assert called == []


def test_making_an_embedding_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    DecoupledEmbedding(EmbeddingShape(3, 10, 6, exponent_heads=2, norms=True))
    assert torch.equal(torch.get_rng_state(), before)
