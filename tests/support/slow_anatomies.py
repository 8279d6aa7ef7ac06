"""What the anatomies of several families share: patches, heads, and layers that are built alike.

Written for `slow_model.run`, from state dicts: nothing here calls the package or the layers of transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tests.support.slow_model import Anatomy, Inputs, Outputs
from tests.support.slow_parts import Weights, layer_norm, linear, quick_gelu


PATCH = 4  # of all models here
LAYER_SCALES = ("lambda_1", "lambda_2")
RELATIVE_TABLE = "relative_position_bias.relative_position_bias_table"
# The settings of BEiT and Data2Vec, each with its own anatomy.
BIASES = {
    "relative": {"use_relative_position_bias": True},
    "shared": {"use_shared_relative_position_bias": True},
    "both": {"use_relative_position_bias": True, "use_shared_relative_position_bias": True},
    "absolute": {"use_absolute_position_embeddings": True, "layer_scale_init_value": 0.0},
}
SDPA_ONNX = "torch.onnx cannot follow SDPA with a bias for every pair of tokens"


def patches(weights: Weights, name: str, image: Tensor) -> Tensor:
    """Each patch of an image [3, h, w], row by row, through the kernel of a convolution: [N, D]."""
    size = weights[f"{name}.weight"].shape[-1]
    rows, columns = image.shape[1] // size, image.shape[2] // size
    flat = [
        image[:, i * size : (i + 1) * size, j * size : (j + 1) * size].flatten()
        for i in range(rows)
        for j in range(columns)
    ]
    mapped = torch.stack(flat) @ weights[f"{name}.weight"].flatten(1).T
    return mapped + weights[f"{name}.bias"] if f"{name}.bias" in weights else mapped


def tubelets(weights: Weights, name: str, clip: Tensor) -> Tensor:
    """Each patch of every few frames of a clip [T, 3, h, w], through the kernel of a convolution: [N, D]."""
    kernel = weights[f"{name}.weight"]
    _, _, frames, size, _ = kernel.shape
    flat = [
        clip[t : t + frames, :, i : i + size, j : j + size].transpose(0, 1).flatten()
        for t in range(0, len(clip), frames)
        for i in range(0, clip.shape[2], size)
        for j in range(0, clip.shape[3], size)
    ]
    return torch.stack(flat) @ kernel.flatten(1).T + weights[f"{name}.bias"]


def grid(inputs: Inputs) -> Tensor:
    """Row and column of every patch: [N, 2]."""
    height, width = (side // PATCH for side in inputs["pixel_values"].shape[1:])
    return torch.tensor([[i, j] for i in range(height) for j in range(width)])


def centres(inputs: Inputs) -> Tensor:
    """The middle of every patch, of an image from -1 to 1 in height and in width: [N, 2]."""
    height, width = (side // PATCH for side in inputs["pixel_values"].shape[1:])
    return torch.tensor(
        [[(2 * i + 1) / height - 1, (2 * j + 1) / width - 1] for i in range(height) for j in range(width)],
        dtype=torch.float64,
    )


def mean(x: Tensor, sizes: Tensor) -> Tensor:
    """Every token as often as it counts."""
    return sum(size * token for size, token in zip(sizes, x, strict=True)) / sizes.sum()


def vit_like(
    root: str, head: Callable[..., Outputs] | None, specials: tuple[str, ...] = ("cls_token",), **changes: Any
) -> Anatomy:
    """ViT, and what is built like it: special tokens, then patches, with or without absolute positions."""
    begin = root + "embeddings."

    def embed(weights: Weights, inputs: Inputs) -> Tensor:
        flat = patches(weights, begin + "patch_embeddings.projection", inputs["pixel_values"])
        x = torch.cat([*(weights[begin + name][0] for name in specials), flat])
        return x + weights[begin + "position_embeddings"][0] if begin + "position_embeddings" in weights else x

    anatomy = Anatomy(
        embed=embed,
        head=head,
        prefix=len(specials),
        layer=root + "layers.{}.",
        norms=("layernorm_before", "layernorm_after"),
        qkv=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        out="attention.o_proj",
    )
    return replace(anatomy, **changes)


def first_token_logits(norm: str, eps: float = 1e-12) -> Callable[..., Outputs]:
    """A classifier on the CLS token."""
    return lambda weights, x, sizes: {"logits": linear(weights, "classifier", layer_norm(weights, norm, x, eps)[0])}


def normed_tokens(norm: str, eps: float = 1e-12) -> Callable[..., Outputs]:
    """All tokens behind the last norm."""
    return lambda weights, x, sizes: {"last_hidden_state": layer_norm(weights, norm, x, eps)}


def beit_like(root: str, **changes: Any) -> Anatomy:
    """BEiT and Data2Vec: a bias by relative position, layer scale, a classifier on the mean of the patches."""

    def head(weights: Weights, x: Tensor, sizes: Tensor) -> Outputs:
        pooled = layer_norm(weights, root + "pooler.layernorm", mean(x[1:], sizes[1:]), 1e-12)
        return {"logits": linear(weights, "classifier", pooled)}

    return vit_like(root, head, **{"scales": LAYER_SCALES, "places": grid, **changes})


def dinov2_like(root: str, registers: int = 0) -> Anatomy:
    """DINOv2, with registers behind the CLS token that have no position; a classifier on CLS and the patches' mean."""
    prefix = 1 + registers

    def head(weights: Weights, x: Tensor, sizes: Tensor) -> Outputs:
        x = layer_norm(weights, root + "layernorm", x, 1e-6)
        return {"logits": linear(weights, "classifier", torch.cat([x[0], mean(x[prefix:], sizes[prefix:])]))}

    anatomy = vit_like(root, head)

    def embed(weights: Weights, inputs: Inputs) -> Tensor:
        x = anatomy.embed(weights, inputs)
        own = [weights[root + "embeddings.register_tokens"][0]] if registers else []
        return torch.cat([x[:1], *own, x[1:]])

    return replace(
        anatomy,
        embed=embed,
        prefix=prefix,
        layer=root + "encoder.layer.{}.",
        norms=("norm1", "norm2"),
        scales=("layer_scale1.lambda1", "layer_scale2.lambda1"),
        eps=1e-6,
    )


def clip_like(root: str, head: Callable[..., Outputs], **changes: Any) -> Anatomy:
    """CLIP's vision tower, and what is built like it; a norm in front of the layers where there is one."""
    begin = root + "embeddings."

    def embed(weights: Weights, inputs: Inputs) -> Tensor:
        x = patches(weights, begin + "patch_embedding", inputs["pixel_values"])
        if begin + "class_embedding" in weights:
            x = torch.cat([weights[begin + "class_embedding"].reshape(1, -1), x])
        if begin + "position_embedding" in weights:  # BLIP's is a parameter
            x = x + weights[begin + "position_embedding"][0]
        else:
            x = x + weights[begin + "position_embedding.weight"]
        for norm in ("pre_layrnorm", "pre_layernorm"):
            x = layer_norm(weights, root + norm, x, 1e-5) if f"{root}{norm}.bias" in weights else x
        return x

    anatomy = Anatomy(
        embed=embed,
        head=lambda weights, x, sizes: head(weights, root, x, sizes),
        prefix=1,
        layer=root + "encoder.layers.{}.",
        norms=("layer_norm1", "layer_norm2"),
        qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        out="self_attn.out_proj",
        activation=quick_gelu,
        eps=1e-5,
    )
    return replace(anatomy, **changes)
