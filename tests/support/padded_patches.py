"""The vision towers of Idefics and SmolVLM: SigLIP's, with padding and positions that are fractions of a side."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.support.family_case import PATCH, Inputs, images
from tests.support.slow_anatomies import clip_like, patches
from tests.support.slow_model import Anatomy, Outputs
from tests.support.slow_parts import Weights, layer_norm, tanh_gelu


UNEVEN_RANGE = "ONNX counts a range of fractions otherwise than torch, unless the patches of a side are a power of two"


def masked_images(count: int, height: int = 32, width: int = 32) -> Inputs:
    """Images without padding."""
    mask = torch.ones(count, height // PATCH, width // PATCH, dtype=torch.bool)
    return {**images(count, height, width), "patch_attention_mask": mask}


def padded_images(count: int) -> Inputs:
    """Images of 5 by 5 and of 5 by 6 patches in turn, within 6 by 6."""
    inputs = masked_images(count, 24, 24)
    for row in range(count):
        height, width = ((5, 5), (5, 6))[row % 2]
        inputs["patch_attention_mask"][row, height:] = False
        inputs["patch_attention_mask"][row, :, width:] = False
    return inputs


def padded_tower() -> Anatomy:
    def embed(weights: Weights, inputs: Inputs) -> Tensor:
        """A patch has the position of the model's own grid that lies at the same fraction of the image's side."""
        table, mask = weights["embeddings.position_embedding.weight"], inputs["patch_attention_mask"]
        side, height, width = round(len(table) ** 0.5), int(mask[:, 0].sum()), int(mask[0].sum())
        places = [
            (i * side // height) * side + j * side // width if mask[i, j] else 0
            for i in range(mask.shape[0])
            for j in range(mask.shape[1])
        ]
        return patches(weights, "embeddings.patch_embedding", inputs["pixel_values"]) + table[places]

    def head(weights: Weights, root: str, x: Tensor, sizes: Tensor) -> Outputs:
        return {"last_hidden_state": layer_norm(weights, "post_layernorm", x, 1e-6)}

    return clip_like("", head, embed=embed, prefix=0, activation=tanh_gelu, eps=1e-6)
