"""A merged vision transformer from its weights alone: docs/method.md section 1, one image at a time, token by token.

Nothing here calls the package or the layers of transformers: an `Anatomy` says what a family's layers are like and
where its state dict keeps what they need, `run` runs them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tests.support import slow_reference as slow
from tests.support.slow_parts import Weights, gelu, layer_norm, learned_of, linear
from tests.support.slow_steps import Reduction, Tokens, draw, each_seeing_itself, in_place, predict, reduce


Inputs = Mapping[str, Tensor]
Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Anatomy:
    """A family. `embed` makes the first tokens [N, D] of one image, `head` outputs of the last ones and their sizes.

    `layer` is what the weights of a layer begin with, its number in braces; the other names come behind it. `qkv` are
    three linear maps or one. `gate` is a linear map whose activation multiplies what the first one of `mlp` gives.
    `tables` are those of relative position biases, with their whole names. `theta` is the
    base of rotary positions. Where it or a table is given, `places` says where the patches of an image lie [N - P, 2].
    `turn` rotates keys and queries by places in another way than DINOv3's. With `whole`, `head` gets the token of
    every patch, in its place. `reader` takes the place of `head` where sizes alone do not say which tokens it reads.
    `residual` multiplies what attention and MLP add, where `scales` are not given.
    """

    embed: Callable[[Weights, Inputs], Tensor]
    head: Callable[[Weights, Tensor, Tensor], Outputs] | None
    prefix: int
    layer: str
    norms: tuple[str, str]
    qkv: tuple[str, ...]
    out: str
    mlp: tuple[str, str] = ("mlp.fc1", "mlp.fc2")
    gate: str | None = None
    activation: Callable[[Tensor], Tensor] = gelu
    eps: float = 1e-12
    heads: int = 4
    scales: tuple[str, str] | None = None
    residual: float = 1.0
    tables: tuple[str, ...] = ()
    theta: float | None = None
    places: Callable[[Inputs], Tensor] | None = None
    turn: Callable[[Tensor, Tensor, Anatomy], Tensor] | None = None
    whole: bool = False
    reader: Callable[[Weights, Tokens], Outputs] | None = None


def run(weights: Weights, anatomy: Anatomy, inputs: Inputs, reduction: Reduction) -> tuple[Outputs, list[Tokens]]:
    """Outputs for one image, and the tokens behind every layer."""
    x = anatomy.embed(weights, inputs)
    sizes = torch.ones(len(x), dtype=x.dtype)
    for name in ("pixel_attention_mask", "patch_attention_mask"):
        sizes = inputs[name].flatten().to(x.dtype) if name in inputs else sizes
    places = None
    if anatomy.places is not None:
        patches = anatomy.places(inputs).to(x.dtype)
        places = torch.cat([patches.new_zeros(anatomy.prefix, patches.shape[1]), patches])
    start = Tokens(x, sizes, places, [[i] for i in range(len(x))], len(x))
    trail = [start]
    for index in range(len(reduction.r or reduction.keep_rates or reduction.steps)):
        trail.append(run_layer(weights, anatomy, index, trail[-1], start, reduction))
    if anatomy.whole:
        return anatomy.head(weights, in_place(trail[-1]), sizes), trail[1:]
    if anatomy.reader is not None:
        return anatomy.reader(weights, trail[-1]), trail[1:]
    outputs = anatomy.head(weights, trail[-1].x, trail[-1].sizes)
    if "last_hidden_state" in outputs:  # a soft merge keeps what it merges away, at the end
        outputs["last_hidden_state"] = outputs["last_hidden_state"][: trail[-1].active]
    if "features" in outputs:  # of the patches alone
        outputs["features"] = outputs["features"][: trail[-1].active - anatomy.prefix]
    return outputs, trail[1:]


def run_layer(
    weights: Weights, anatomy: Anatomy, index: int, tokens: Tokens, start: Tokens, reduction: Reduction
) -> Tokens:
    """One layer: attention, the reduction, the MLP."""
    root = anatomy.layer.format(index)
    attend_scale = mlp_scale = anatomy.residual
    if anatomy.scales:
        attend_scale, mlp_scale = (weights[root + name] for name in anatomy.scales)
    h = layer_norm(weights, root + anatomy.norms[0], tokens.x, anatomy.eps)
    if len(anatomy.qkv) == 1:
        q, k, v = linear(weights, root + anatomy.qkv[0], h).chunk(3, dim=1)
    else:
        q, k, v = (linear(weights, root + name, h) for name in anatomy.qkv)
    # Padding (of size 0) is never attended to, whatever sizes count for.
    counted = tokens.sizes if reduction.proportional or reduction.soft else (tokens.sizes > 0).to(h.dtype)
    if tokens.kept is not None:
        counted = each_seeing_itself(tokens.sizes if reduction.proportional else tokens.kept)
    exponents = learned_of(weights, f"merge_embedding.exponents.{index}")
    if exponents is not None:
        counted = slow.powers(counted, exponents)
    bias = None
    if anatomy.tables:
        tables = [weights[name.format(index)] for name in anatomy.tables]
        bias = sum(relative_bias(table, tokens.places, start.places, anatomy.prefix) for table in tables)
    turn = anatomy.turn or (rotate if anatomy.theta else None)
    turned = [part if turn is None else turn(part, tokens.places, anatomy) for part in (q, k)]
    scaling = (q.shape[1] // anatomy.heads) ** -0.5
    shares = slow.attention_weights(*turned, anatomy.heads, scaling, counted, bias)
    x = tokens.x + attend_scale * linear(weights, root + anatomy.out, slow.mix(shares, v))

    matrix = learned_of(weights, f"merge_embedding.layers.{index}.weight")
    if matrix is None:
        metric = sum(k.chunk(anatomy.heads, dim=1)) / anatomy.heads
    else:
        metric = h.detach() @ matrix.T + learned_of(weights, f"merge_embedding.layers.{index}.bias")
    share = learned_of(weights, f"merge_embedding.norms.{index}")
    # The lengths of tokens are merged beside them, as one more feature.
    carried = x if share is None else torch.cat([x, x.norm(dim=1, keepdim=True)], dim=1)
    attended, merged = shares[:, 0].mean(dim=0), replace(tokens, x=x)
    if not reduction.between:
        merged = reduce(carried, tokens, start, index, metric, attended, anatomy.prefix, reduction)
    if share is not None:
        merged = replace(merged, x=slow.lengthen(merged.x[:, :-1], merged.x[:, -1], share))

    h = layer_norm(weights, root + anatomy.norms[1], merged.x, anatomy.eps)
    grown = anatomy.activation(linear(weights, root + (anatomy.gate or anatomy.mlp[0]), h))
    if anatomy.gate is not None:
        grown = grown * linear(weights, root + anatomy.mlp[0], h)
    grown = linear(weights, root + anatomy.mlp[1], grown)
    merged = replace(merged, x=merged.x + mlp_scale * grown)
    if index in reduction.noise:
        return draw(weights, merged, start, index, anatomy.prefix, reduction.noise)
    if not reduction.between or reduction.steps[index] is None:
        return merged
    stage = sum(step is not None for step in reduction.steps[:index])
    counted = (merged.sizes > 0).to(h.dtype)
    scores = predict(weights, f"merge_embedding.predictors.{stage}.", merged.x, counted, anatomy.prefix)[:, 0]
    return reduce(merged.x, merged, start, index, metric, scores, anatomy.prefix, reduction)


def relative_bias(table: Tensor, places: Tensor, original: Tensor, prefix: int) -> Tensor:
    """BEiT's bias between tokens, each at the patch nearest to its place: table [(2h-1)(2w-1) + 3, H] -> [H, n, n].

    The last three rows are those from CLS to a patch, from a patch to CLS, and from CLS to itself.
    """
    height, width = (int(side) + 1 for side in original.max(dim=0).values.tolist())
    nearest = [(round(row), round(column)) for row, column in places.tolist()]
    index = []
    for i, (row, column) in enumerate(nearest):
        for j, (other_row, other_column) in enumerate(nearest):
            if i < prefix or j < prefix:
                index.append(len(table) - (1 if i < prefix and j < prefix else 3 if i < prefix else 2))
            else:
                down, right = row - other_row + height - 1, column - other_column + width - 1
                index.append(down * (2 * width - 1) + right)
    return table[index].T.unflatten(1, (len(nearest), len(nearest)))


def rotate(x: Tensor, places: Tensor, anatomy: Anatomy) -> Tensor:
    """DINOv3's rotary positions: the pairs of a head, as complex numbers, turn with row and then with column.

    x [n, H·d], places [n, 2] between -1 and 1; prefix tokens are not turned.
    """
    heads = []
    for part in x.chunk(anatomy.heads, dim=1):
        real, imaginary = part.chunk(2, dim=1)
        quarter = real.shape[1] // 2
        frequencies = torch.tensor([anatomy.theta ** (-j / quarter) for j in range(quarter)], dtype=x.dtype)
        angles = math.tau * torch.cat([places[:, :1] * frequencies, places[:, 1:] * frequencies], dim=1)
        turned = torch.complex(real, imaginary) * torch.complex(angles.cos(), angles.sin())
        whole = torch.cat([turned.real, turned.imag], dim=1)
        heads.append(torch.cat([part[: anatomy.prefix], whole[anatomy.prefix :]]))
    return torch.cat(heads, dim=1)
