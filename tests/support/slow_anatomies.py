"""Every family's anatomy: how its tokens are made, what its layers look like, and who reads what is left.

Written for `slow_model.run`, from state dicts: nothing here calls the package or the layers of transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from tests.support import slow_reference as slow
from tests.support.slow_model import Anatomy, Inputs, Outputs, Weights, gelu, layer_norm, linear, quick_gelu, tanh_gelu


PATCH = 4  # of all models here
LAYER_SCALES = ("lambda_1", "lambda_2")
RELATIVE_TABLE = "relative_position_bias.relative_position_bias_table"


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
    root: str, head: Callable[..., Outputs], specials: tuple[str, ...] = ("cls_token",), **changes: Any
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


def vit_head(weights: Weights, x: Tensor, sizes: Tensor) -> Outputs:
    x = layer_norm(weights, "layernorm", x, 1e-12)
    return {"last_hidden_state": x, "pooler_output": linear(weights, "pooler.dense", x[0]).tanh()}


def teacher_head(weights: Weights, x: Tensor, sizes: Tensor) -> Outputs:
    x = layer_norm(weights, "deit.layernorm", x, 1e-12)
    ours, theirs = linear(weights, "cls_classifier", x[0]), linear(weights, "distillation_classifier", x[1])
    return {"logits": (ours + theirs) / 2, "cls_logits": ours, "distillation_logits": theirs}


def ijepa_head(weights: Weights, x: Tensor, sizes: Tensor) -> Outputs:
    """The patches are normalised first, and averaged then."""
    return {"logits": linear(weights, "classifier", mean(layer_norm(weights, "ijepa.layernorm", x, 1e-12), sizes))}


def mae_embed(weights: Weights, inputs: Inputs) -> Tensor:
    """The quarter of the patches that is left out is that of the largest noise; the others come by their noise."""
    positions = weights["embeddings.position_embeddings"][0]
    x = patches(weights, "embeddings.patch_embeddings.projection", inputs["pixel_values"]) + positions[1:]
    noise = inputs["noise"].tolist()
    order = sorted(range(len(x)), key=lambda i: noise[i])[: int(len(x) * 0.75)]
    return torch.cat([weights["embeddings.cls_token"][0] + positions[:1], x[order]])


def beit_like(root: str, **changes: Any) -> Anatomy:
    """BEiT and Data2Vec: a bias by relative position, layer scale, a classifier on the mean of the patches."""

    def head(weights: Weights, x: Tensor, sizes: Tensor) -> Outputs:
        pooled = layer_norm(weights, root + "pooler.layernorm", mean(x[1:], sizes[1:]), 1e-12)
        return {"logits": linear(weights, "classifier", pooled)}

    return vit_like(root, head, **{"scales": LAYER_SCALES, "places": grid, **changes})


def data2vec(*tables: str, **changes: Any) -> Anatomy:
    return beit_like(
        "data2vec_vision.",
        layer="data2vec_vision.encoder.layer.{}.",
        mlp=("intermediate.dense", "output.dense"),
        tables=tuple("data2vec_vision.encoder." + name for name in tables),
        **changes,
    )


def beit(*tables: str, **changes: Any) -> Anatomy:
    return beit_like("beit.", tables=tuple("beit." + name for name in tables), **changes)


def dinov2(name: str, registers: int) -> Anatomy:
    """DINOv2, with registers behind the CLS token that have no position; a classifier on CLS and the patches' mean."""
    root, prefix = name + ".", 1 + registers

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


def dinov3(registers: int) -> Anatomy:
    def embed(weights: Weights, inputs: Inputs) -> Tensor:
        flat = patches(weights, "embeddings.patch_embeddings", inputs["pixel_values"])
        return torch.cat([weights["embeddings.cls_token"][0], weights["embeddings.register_tokens"][0], flat])

    def head(weights: Weights, x: Tensor, sizes: Tensor) -> Outputs:
        x = layer_norm(weights, "norm", x, 1e-5)
        return {"last_hidden_state": x, "pooler_output": x[0]}

    return replace(
        dinov2("", registers),
        embed=embed,
        head=head,
        layer="model.layer.{}.",
        mlp=("mlp.up_proj", "mlp.down_proj"),
        eps=1e-5,
        theta=100.0,
        places=centres,
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
        return layer_norm(weights, root + "pre_layrnorm", x, 1e-5) if root + "pre_layrnorm.bias" in weights else x

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


def clip_head(weights: Weights, root: str, x: Tensor, sizes: Tensor) -> Outputs:
    pooled = layer_norm(weights, root + "post_layernorm", x[0], 1e-5)
    if "visual_projection.weight" in weights:
        return {"last_hidden_state": x, "image_embeds": linear(weights, "visual_projection", pooled)}
    return {"last_hidden_state": x, "pooler_output": pooled}


def clip_classifier_head(weights: Weights, root: str, x: Tensor, sizes: Tensor) -> Outputs:
    return {"logits": linear(weights, "classifier", mean(x[1:], sizes[1:]))}


def git_head(weights: Weights, root: str, x: Tensor, sizes: Tensor) -> Outputs:
    return {"last_hidden_state": layer_norm(weights, root + "post_layernorm", x, 1e-5)}


def blip_head(weights: Weights, root: str, x: Tensor, sizes: Tensor) -> Outputs:
    """The pooled token is normalised twice."""
    x = layer_norm(weights, root + "post_layernorm", x, 1e-5)
    return {"last_hidden_state": x, "pooler_output": layer_norm(weights, root + "post_layernorm", x[0], 1e-5)}


def siglip_head(weights: Weights, root: str, x: Tensor, sizes: Tensor) -> Outputs:
    """A probe attends to the tokens, each as often as it counts."""
    x = layer_norm(weights, root + "post_layernorm", x, 1e-6)
    inside = root + "head."
    maps = zip(
        weights[inside + "attention.in_proj_weight"].chunk(3),
        weights[inside + "attention.in_proj_bias"].chunk(3),
        (weights[inside + "probe"][0], x, x),
        strict=True,
    )
    q, k, v = (tokens @ weight.T + bias for weight, bias, tokens in maps)
    pooled = linear(weights, inside + "attention.out_proj", slow.attention(q, k, v, 4, 8**-0.5, sizes))
    h = tanh_gelu(linear(weights, inside + "mlp.fc1", layer_norm(weights, inside + "layernorm", pooled, 1e-6)))
    pooled = pooled + linear(weights, inside + "mlp.fc2", h)
    return {"last_hidden_state": x, "pooler_output": pooled[0]}


def siglip_classifier_head(weights: Weights, root: str, x: Tensor, sizes: Tensor) -> Outputs:
    x = layer_norm(weights, root + "post_layernorm", x, 1e-6)
    return {"logits": linear(weights, "classifier", mean(x, sizes))}


def siglip(root: str = "", head: Callable[..., Outputs] = siglip_head, **changes: Any) -> Anatomy:
    return clip_like(root, head, prefix=0, activation=tanh_gelu, eps=1e-6, **changes)


def siglip2(root: str = "", head: Callable[..., Outputs] = siglip_head) -> Anatomy:
    """Patches come flat, with positions resized to the image's own grid; what is behind them counts for nothing."""

    def embed(weights: Weights, inputs: Inputs) -> Tensor:
        table = weights[root + "embeddings.position_embedding.weight"]
        side, (height, width) = round(len(table) ** 0.5), inputs["spatial_shapes"].tolist()
        square = table.T.unflatten(1, (side, side)).unsqueeze(0)
        resized = interpolate(square, (height, width), mode="bilinear", antialias=True)[0].flatten(1).T
        real = linear(weights, root + "embeddings.patch_embedding", inputs["pixel_values"][: height * width]) + resized
        return torch.cat([real, torch.full_like(real[:1], 7.0).expand(len(inputs["pixel_values"]) - len(real), -1)])

    return siglip(root, head, embed=embed)


ANATOMIES: dict[str, Anatomy] = {
    "vit": vit_like("vit.", first_token_logits("vit.layernorm")),
    "vit-bare": vit_like("", vit_head),
    "deit": vit_like("deit.", first_token_logits("deit.layernorm"), ("cls_token", "distillation_token")),
    "deit-teacher": vit_like("deit.", teacher_head, ("cls_token", "distillation_token")),
    "vit_msn": vit_like("vit.", first_token_logits("vit.layernorm", 1e-6), eps=1e-6),
    "vit_mae": vit_like(
        "",
        lambda weights, x, sizes: {"last_hidden_state": layer_norm(weights, "layernorm", x, 1e-12)},
        embed=mae_embed,
    ),
    "ijepa": vit_like(
        "", lambda weights, x, sizes: {"last_hidden_state": layer_norm(weights, "layernorm", x, 1e-12)}, ()
    ),
    "ijepa-classifier": vit_like("ijepa.", ijepa_head, ()),
    "beit-relative": beit("layers.{}." + RELATIVE_TABLE),
    "beit-shared": beit("shared_position_bias.relative_position_bias_table"),
    "beit-both": beit("layers.{}." + RELATIVE_TABLE, "shared_position_bias.relative_position_bias_table"),
    "beit-absolute": beit(scales=None),
    "data2vec-relative": data2vec("layer.{}.attention.attention." + RELATIVE_TABLE),
    "data2vec-shared": data2vec(RELATIVE_TABLE),
    "data2vec-both": data2vec("layer.{}.attention.attention." + RELATIVE_TABLE, RELATIVE_TABLE),
    "data2vec-absolute": data2vec(scales=None),
    "dinov2": dinov2("dinov2", 0),
    "dinov2_with_registers": dinov2("dinov2_with_registers", 3),
    "dinov3_vit": dinov3(4),
    "clip": clip_like("", clip_head),
    "clip-projection": clip_like("vision_model.", clip_head),
    "clip-classifier": clip_like("vision_model.", clip_classifier_head),
    "siglip": siglip(),
    "siglip-classifier": siglip("vision_model.", siglip_classifier_head),
    "siglip2": siglip2(),
    "siglip2-classifier": siglip2("vision_model.", siglip_classifier_head),
    "git": clip_like("vision_model.", git_head),
    "blip": clip_like("", blip_head, qkv=("self_attn.qkv",), out="self_attn.projection", activation=gelu),
}
