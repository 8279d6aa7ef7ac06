"""DINOv3 ViT: CLS and registers, then patches whose keys and queries are rotated by where they lie.

A merged token lies at the size-weighted mean of its patches. Tokens carry their coordinates, read off the rotation of
the lowest frequency that the model itself made (which keeps its augmentation of positions), and are rotated anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTBackbone, DINOv3ViTEncoder, DINOv3ViTModel

from ..errors import UnsupportedModelError
from ..token_state import TokenState
from .base import LayerMerging
from .dinov2 import Dinov2Like


Rotation = tuple[Tensor, Tensor]


def inverse_frequencies(theta: float, head_dim: int, device: torch.device) -> Tensor:
    """Angular frequencies over the coordinates' half range: [d / 4], falling from 1."""
    return 1 / theta ** torch.arange(0, 1, 4 / head_dim, dtype=torch.float32, device=device)


def coordinates(rotation: Rotation, theta: float) -> Tensor:
    """Where patches lie, from cosines and sines [N, d]: [N, 2] (row, column), float32.

    An angle is 2π · coordinate · frequency; the lowest frequency turns too little for the sine to be ambiguous.
    """
    _, sin = rotation
    lowest = inverse_frequencies(theta, sin.shape[-1], sin.device)[-1]
    quarter = sin.shape[-1] // 4
    return sin[..., [quarter - 1, 2 * quarter - 1]].float().asin() / (2 * math.pi * lowest)


def rotation_at(positions: Tensor, theta: float, head_dim: int, dtype: torch.dtype) -> Rotation:
    """Cosines and sines for coordinates [B, n, 2] -> twice [B, 1, n, d]."""
    frequencies = inverse_frequencies(theta, head_dim, positions.device)
    angles = 2 * math.pi * positions.unsqueeze(-1) * frequencies  # [B, n, 2, d / 4]
    angles = angles.flatten(2).tile(2).unsqueeze(1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(keys: Tensor, rotation: Rotation) -> Tensor:
    """Rotate the keys of patches and leave those of prefix tokens: [B, H, P + n, d], cosines and sines of n."""
    cos, sin = rotation
    prefix, patches = keys.split([keys.shape[2] - cos.shape[-2], cos.shape[-2]], dim=2)
    first, second = patches.chunk(2, dim=-1)
    return torch.cat([prefix, patches * cos + torch.cat([-second, first], dim=-1) * sin], dim=2)


class DINOv3ViTLayerMerging(LayerMerging):
    """Merging between the attention and the MLP of a `DINOv3ViTLayer`."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Rotation | None = None,
        token_state: TokenState | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if token_state is None:
            return super().forward(  # type: ignore[misc]
                hidden_states, attention_mask=attention_mask, position_embeddings=position_embeddings, **kwargs
            )
        assert position_embeddings is not None
        normed = self.norm1(hidden_states)
        bias = self.attention_bias(hidden_states, attention_mask, token_state)
        rotation = self._rotation(hidden_states, position_embeddings, token_state)
        attended, _ = self.attention(normed, attention_mask=bias, position_embeddings=rotation, **kwargs)
        attended = self.drop_path(self.layer_scale1(attended))
        turn: Callable[[Tensor], Tensor] = lambda keys: rotate(keys, rotation)  # noqa: E731
        hidden_states = self.merge_step(attended + hidden_states, normed, token_state, bias, turn)
        return self.drop_path(self.layer_scale2(self.run_mlp(self.norm2(hidden_states), token_state))) + hidden_states

    def _rotation(self: Any, hidden_states: Tensor, original: Rotation, state: TokenState) -> Rotation:
        theta, prefix = self.attention.config.rope_theta, state.num_prefix_tokens
        if self.merge_index == 0:
            places = coordinates(original, theta).expand(hidden_states.shape[0], -1, -1)
            state.place(torch.cat([places.new_zeros(places.shape[0], prefix, 2), places], dim=1))
        if not state.has_merged(self.merge_index):
            return original
        positions = state.positions(self.merge_index)
        assert positions is not None
        return rotation_at(positions[:, prefix:], theta, original[0].shape[-1], original[0].dtype)


class DINOv3ViTFamily(Dinov2Like):
    encoder_class = DINOv3ViTEncoder
    models = {"AutoModel": (DINOv3ViTModel,), "AutoBackbone": (DINOv3ViTBackbone,)}
    dense = (DINOv3ViTBackbone,)
    layer_merging = DINOv3ViTLayerMerging
    open_attention = None  # it turns queries and keys in between

    def key_linear(self, layer: Any) -> tuple[nn.Module, int]:
        return layer.attention.k_proj, layer.attention.num_heads

    def check(self, model: nn.Module, encoder: Any) -> None:
        config = encoder.config
        head_dim = config.hidden_size // config.num_attention_heads
        if head_dim < 8:
            raise UnsupportedModelError(f"head width {head_dim}: positions can be read off rotations from 8 on.")
