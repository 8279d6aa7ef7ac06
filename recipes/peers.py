"""Peers for recipes/benchmark.py that drop tokens at no cost: the upper bound of the speed-up by merging.

python recipes/benchmark.py --model recipes/configs/deit_small --random_weights True --r 16 \
    --peer recipes.peers:sliced
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn import functional as F


def sliced(model: Any, r: int) -> Callable[[Tensor], Tensor]:
    """A ViT that drops its last r tokens (at most half of them) after every attention.

    It has no metric, matching, merging or sizes. All other operations are the same.
    """
    _check(model)

    def run(pixels: Tensor) -> Tensor:
        x = model.vit.embeddings(pixels)
        for layer in model.vit.layers:
            attention, mlp, normed = layer.attention, layer.mlp, layer.layernorm_before(x)
            parts = attention.q_proj, attention.k_proj, attention.v_proj
            x = x + attention.o_proj(_attend(normed, parts, attention.head_dim))
            x = x[:, : x.shape[1] - min(r, (x.shape[1] - 1) // 2)]
            x = x + mlp.fc2(F.gelu(mlp.fc1(layer.layernorm_after(x))))
        return model.classifier(model.vit.layernorm(x)[:, 0])

    return run


def sliced_layers(model: Any, r: int) -> Callable[[Tensor], Tensor]:
    """`sliced` in transformers' own modules: what a merged model lacks of it is the price of merging alone."""

    def drop(layer: Any, x: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        x = x + layer.attention(layer.layernorm_before(x), attention_mask=attention_mask, **kwargs)[0]
        x = x[:, : x.shape[1] - min(r, (x.shape[1] - 1) // 2)]
        return x + layer.mlp(layer.layernorm_after(x))

    for layer in model.vit.layers:
        layer.forward = partial(drop, layer)
    return lambda pixels: model(pixel_values=pixels).logits


def sliced_video(model: Any, r: int) -> Callable[[Tensor], Tensor]:
    """`sliced` for a VideoMAE classifier: clips [B, F, C, H, W]."""
    _check(model)

    def run(clips: Tensor) -> Tensor:
        x = model.videomae.embeddings(clips, None)
        for layer in model.videomae.encoder.layer:
            attention, normed = layer.attention.attention, layer.layernorm_before(x)
            parts = attention.query, attention.key, attention.value
            x = x + layer.attention.output.dense(_attend(normed, parts, attention.attention_head_size))
            x = x[:, : x.shape[1] - min(r, x.shape[1] // 2)]
            x = x + layer.output.dense(F.gelu(layer.intermediate.dense(layer.layernorm_after(x))))
        return model.classifier(model.fc_norm(x.mean(1)))

    return run


def _check(model: Any) -> None:
    if model.config.hidden_act != "gelu":
        raise RuntimeError(f"hidden_act={model.config.hidden_act!r}: this peer is written for 'gelu'")


def _attend(x: Tensor, projections: Sequence[Any], head_size: int) -> Tensor:
    """Self-attention: project x [B, N, D] to queries, keys and values, and attend in all heads. Returns [B, N, D]."""
    heads = [projection(x).view(*x.shape[:2], -1, head_size).transpose(1, 2) for projection in projections]
    return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)  # [B, H, N, d] -> [B, N, H · d]
