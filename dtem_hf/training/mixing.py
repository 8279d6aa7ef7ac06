"""Mixup and cutmix on a batch (METHOD.md section 5), by kornia."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.augmentation import drawn_from


@dataclass
class Mixed:
    """pixel_values [B, C, H, W]; image i consists of image `partner[i]` to `share[i]`, and of itself for the rest."""

    pixel_values: Tensor
    partner: Tensor
    share: Tensor


def mix(pixel_values: Tensor, mixup: float, cutmix: float, key: Sequence[int]) -> Mixed:
    """Mix a batch by mixup or cutmix, either with probability 1/2 where both are above 0.

    The two are parameters of symmetric Beta distributions, from which one share is drawn for the whole batch (DeiT's
    recipe). The draw depends on `key` alone.
    """
    order = torch.arange(len(pixel_values), device=pixel_values.device)
    if not mixup and not cutmix:
        return Mixed(pixel_values, order, torch.zeros(len(order), device=order.device))
    import kornia.augmentation as parts

    options = {"data_keys": ["input", "class"], "same_on_batch": True}
    with drawn_from(key):
        if not cutmix or (mixup and torch.rand(()) < 0.5):
            # kornia draws uniformly between two bounds: both are set to a draw from the Beta distribution.
            share = torch.distributions.Beta(mixup, mixup).sample().expand(2)
            pixels, pairs = parts.RandomMixUpV2(lambda_val=share, **options)(pixel_values, order)
        else:
            blend = parts.RandomCutMixV2(beta=float(cutmix), use_correct_lambda=True, **options)
            pixels, pairs = blend(pixel_values, order)
            pairs = pairs[0].clone()
            pairs[:, 2] = 1 - pairs[:, 2]  # RandomCutMixV2 returns the share that is left
    return Mixed(pixels, pairs[:, 1].long(), pairs[:, 2].float())


def soft_targets(labels: Tensor, mixed: Mixed, num_classes: int) -> Tensor:
    """Labels [B] of the images before mixing -> targets of the mixed images [B, num_classes], rows sum to 1."""
    own = F.one_hot(labels, num_classes).float()
    share = mixed.share.unsqueeze(-1)
    return (1 - share) * own + share * own[mixed.partner]
