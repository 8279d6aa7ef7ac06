"""DINOv3 ViT: CLS and registers, then patches with rotary positions.

The position of a merged token is the size-weighted mean of its patches' positions, and every layer rotates queries and
keys by it. The patches' positions are computed back from the model's own rotations, from the lowest frequency. So the
model's random augmentation of positions is kept.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.dinov3_vit.modeling_dinov3_vit import (
    DINOv3ViTBackbone,
    DINOv3ViTEncoder,
    DINOv3ViTModel,
    apply_rotary_pos_emb,
)

from ..errors import UnsupportedModelError
from ..token_state import TokenState
from .dinov2 import DINOV3_LAYER
from .family import Family
from .layer import LayerMerging


Rotation = tuple[Tensor, Tensor]


def inverse_frequencies(theta: float, head_dim: int, device: torch.device) -> Tensor:
    """Inverse frequencies of the rotations: [d / 4], falling from 1."""
    return 1 / theta ** torch.arange(0, 1, 4 / head_dim, dtype=torch.float32, device=device)


def coordinates(rotation: Rotation, theta: float) -> Tensor:
    """Positions of patches from cosines and sines [N, d]: [N, 2] (row, column), float32.

    An angle is 2π · coordinate · frequency; at the lowest frequency it is so small that the sine determines it.
    """
    _, sin = rotation
    lowest = inverse_frequencies(theta, sin.shape[-1], sin.device)[-1]
    quarter = sin.shape[-1] // 4
    return sin[..., [quarter - 1, 2 * quarter - 1]].float().asin() / (2 * math.pi * lowest)


def rotation_at(positions: Tensor, theta: float, head_dim: int, dtype: torch.dtype) -> Rotation:
    """Cosines and sines at positions [B, n, 2]: twice [B, 1, n, d]."""
    frequencies = inverse_frequencies(theta, head_dim, positions.device)
    angles = 2 * math.pi * positions.unsqueeze(-1) * frequencies  # [B, n, 2, d / 4]
    angles = angles.flatten(2).tile(2).unsqueeze(1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


class DINOv3ViTMerging(LayerMerging):
    """The attention of a `DINOv3ViTLayer` gets rotations for the merged tokens."""

    def attention_inputs(
        self: Any, hidden_states: Tensor, attention_mask: Tensor | None, state: TokenState, kwargs: dict[str, Any]
    ) -> Tensor | None:
        original, theta = kwargs["position_embeddings"], self.attention.config.rope_theta
        prefix = state.num_prefix_tokens
        if self.merge_index == 0:
            places = coordinates(original, theta).expand(hidden_states.shape[0], -1, -1)
            state.place(torch.cat([places.new_zeros(places.shape[0], prefix, 2), places], dim=1))
        bias = super().attention_inputs(hidden_states, attention_mask, state, kwargs)
        positions = state.positions(self.merge_index)
        if state.has_merged(self.merge_index) and positions is not None:
            kwargs["position_embeddings"] = rotation_at(
                positions[:, prefix:], theta, original[0].shape[-1], original[0].dtype
            )
        state.rotation = kwargs["position_embeddings"]
        return bias

    def rotated(self, keys: Tensor, state: TokenState) -> Tensor:
        return apply_rotary_pos_emb(keys[:, :0], keys, *state.rotation)[1]


class DINOv3ViTFamily(Family):
    """Positions are computed from rotations, which needs a head width of at least 8."""

    def check(self, model: nn.Module, encoder: Any) -> None:
        head_dim = self.geometry(encoder).head_dim
        if head_dim < 8:
            raise UnsupportedModelError(f"head width {head_dim}: positions can be computed from rotations from 8 on.")


FAMILY = DINOv3ViTFamily(
    encoders={DINOv3ViTEncoder: "layer"},
    anatomy=DINOV3_LAYER,
    models={DINOv3ViTModel: "tokens", DINOv3ViTBackbone: "grid"},
    layer_merging=DINOv3ViTMerging,
)
