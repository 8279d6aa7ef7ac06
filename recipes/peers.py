"""A peer for recipes/benchmark.py: what fewer tokens save on a machine by themselves.

python recipes/benchmark.py --model recipes/configs/deit_small --random_weights True --r 16 \
    --peer recipes.peers:sliced
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F


def sliced(model: Any, r: int) -> Callable[[Tensor], Tensor]:
    """A ViT that drops its last r tokens (at most half of them) after every attention, which costs nothing.

    It has no metric, matching, merging or sizes; all other operations are the same.
    """
    if model.config.hidden_act != "gelu":
        raise RuntimeError(f"hidden_act={model.config.hidden_act!r}: this peer is written for 'gelu'")

    def run(pixels: Tensor) -> Tensor:
        x = model.vit.embeddings(pixels)
        for layer in model.vit.layers:
            attention, mlp, normed = layer.attention, layer.mlp, layer.layernorm_before(x)
            shape = (*x.shape[:2], -1, attention.head_dim)
            query, key, value = (
                projection(normed).view(shape).transpose(1, 2)
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
            x = x + attention.o_proj(mixed)
            x = x[:, : x.shape[1] - min(r, (x.shape[1] - 1) // 2)]
            x = x + mlp.fc2(F.gelu(mlp.fc1(layer.layernorm_after(x))))
        return model.classifier(model.vit.layernorm(x)[:, 0])

    return run


def sliced_video(model: Any, r: int) -> Callable[[Tensor], Tensor]:
    """`sliced` for a VideoMAE classifier: clips [B, F, C, H, W]."""
    if model.config.hidden_act != "gelu":
        raise RuntimeError(f"hidden_act={model.config.hidden_act!r}: this peer is written for 'gelu'")

    def run(clips: Tensor) -> Tensor:
        x = model.videomae.embeddings(clips, None)
        for layer in model.videomae.encoder.layer:
            attention, normed = layer.attention.attention, layer.layernorm_before(x)
            shape = (*x.shape[:2], -1, attention.attention_head_size)
            query, key, value = (
                projection(normed).view(shape).transpose(1, 2)
                for projection in (attention.query, attention.key, attention.value)
            )
            mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
            x = x + layer.attention.output.dense(mixed)
            x = x[:, : x.shape[1] - min(r, x.shape[1] // 2)]
            x = x + layer.output.dense(F.gelu(layer.intermediate.dense(layer.layernorm_after(x))))
        return model.classifier(model.fc_norm(x.mean(1)))

    return run
