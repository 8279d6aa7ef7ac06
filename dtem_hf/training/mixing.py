"""Mixup and cutmix on a batch (METHOD.md section 5), by kornia: which image each is mixed with, and in what share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.augmentation import drawn_from, kornia


@dataclass
class Mixed:
    """pixel_values [B, C, H, W]; image i holds `share` [B] of image `partner[i]` [B], and the rest of itself."""

    pixel_values: Tensor
    partner: Tensor
    share: Tensor


def mix(pixel_values: Tensor, mixup: float, cutmix: float, key: Sequence[int]) -> Mixed:
    """Mix a batch by one of mixup and cutmix, drawn half and half where both are above 0.

    They are the parameters of the symmetric Beta distributions of the share, which is one for the batch (DeiT's
    recipe). What is drawn depends on `key` alone.
    """
    order = torch.arange(len(pixel_values), device=pixel_values.device)
    if not mixup and not cutmix:
        return Mixed(pixel_values, order, torch.zeros(len(order), device=order.device))
    parts = kornia("mixup and cutmix")
    options = {"data_keys": ["input", "class"], "same_on_batch": True}
    with drawn_from(key):
        if not cutmix or (mixup and torch.rand(()) < 0.5):
            # kornia draws evenly between two bounds; what is wanted is a Beta.
            share = torch.distributions.Beta(mixup, mixup).sample().expand(2)
            pixels, pairs = parts.RandomMixUpV2(lambda_val=share, **options)(pixel_values, order)
        else:
            blend = parts.RandomCutMixV2(beta=float(cutmix), use_correct_lambda=True, **options)
            pixels, pairs = blend(pixel_values, order)
            pairs = pairs[0].clone()
            pairs[:, 2] = 1 - pairs[:, 2]  # here it says how much is left
    return Mixed(pixels, pairs[:, 1].long(), pairs[:, 2].float())


def soft_targets(labels: Tensor, mixed: Mixed, num_classes: int) -> Tensor:
    """Labels [B] of what a batch was mixed of -> [B, num_classes], rows sum to 1."""
    own = F.one_hot(labels, num_classes).float()
    share = mixed.share.unsqueeze(-1)
    return (1 - share) * own + share * own[mixed.partner]
