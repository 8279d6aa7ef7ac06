"""Peers for recipes/benchmark.py: what fewer tokens save on a machine by themselves, and what layers as one call do.

python recipes/benchmark.py --model recipes/configs/deit_small --random_weights True --r 16 \
    --peer recipes.peers:sliced recipes.peers:plain_fused
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from dtem_hf import ToMeConfig, attach
from dtem_hf.families.fused_layers import weights_of
from dtem_hf.ops import fused_layer


def sliced(model: Any, r: int) -> Callable[[Tensor], Tensor]:
    """A ViT that drops its last r tokens (half of them, where there are fewer) behind every attention, for nothing.

    No metric, no matching, no merging, no sizes, and the same operations otherwise, called one after the other.
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


def plain_fused(model: Any, r: int) -> Callable[[Tensor], Tensor]:
    """The plain ViT, whatever r, every layer as the one call that a merged model makes of it: nothing is dropped.

    The speed-up of a merged model over this one is what fewer tokens save (and fewer rows, in a last layer of which
    CLS alone is read), by the same products on both sides. Raises RuntimeError where layers are not run so.
    """
    model = attach(model, ToMeConfig(r=0))
    vit, width = model.vit, model.config.hidden_size
    if not fused_layer.is_available() or any(weights_of(layer.fused_parts(), width) is None for layer in vit.layers):
        raise RuntimeError("merged models do not run layers as one call on this machine: leave this peer out")

    def run(pixels: Tensor) -> Tensor:
        x, scratch = vit.embeddings(pixels), fused_layer.Scratch()
        for layer in vit.layers:
            weights = weights_of(layer.fused_parts(), width) if fused_layer.can_run(x) else None
            # By its modules where somebody counts what runs.
            x = layer(x) if weights is None else fused_layer.run(x, weights, scratch=scratch)[0]
        return model.classifier(vit.layernorm(x)[:, 0])

    return run
