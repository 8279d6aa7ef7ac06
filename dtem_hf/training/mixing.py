"""Mixup and cutmix on a batch (docs/method.md section 5), by kornia."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.augmentation import drawn_from


@dataclass
class Mixed:
    """A mixed batch, pixel_values [B, C, H, W]: a share `share[i]` of image i comes from image `partner[i]`."""

    pixel_values: Tensor
    partner: Tensor
    share: Tensor


def mix(pixel_values: Tensor, mixup: float, cutmix: float, key: Sequence[int]) -> Mixed:
    """Mix a batch by mixup or cutmix; if both are above 0, by one of them with probability 1/2.

    `mixup` and `cutmix` are parameters of symmetric Beta distributions; one share is drawn for the whole batch (DeiT's
    recipe). The draw depends only on `key`.
    """
    order = torch.arange(len(pixel_values), device=pixel_values.device)
    if not mixup and not cutmix:
        return Mixed(pixel_values, order, torch.zeros(len(order), device=order.device))
    import kornia.augmentation as parts

    options = {"data_keys": ["input", "class"], "same_on_batch": True}
    with drawn_from(key):
        if not cutmix or (mixup and torch.rand(()) < 0.5):
            # kornia draws uniformly between two bounds: set both to one draw from the Beta distribution.
            share = torch.distributions.Beta(mixup, mixup).sample().expand(2)
            pixels, pairs = parts.RandomMixUpV2(lambda_val=share, **options)(pixel_values, order)
        else:
            blend = parts.RandomCutMixV2(beta=float(cutmix), use_correct_lambda=True, **options)
            pixels, pairs = blend(pixel_values, order)
            pairs = pairs[0].clone()
            pairs[:, 2] = 1 - pairs[:, 2]  # RandomCutMixV2 returns the image's own share
    return Mixed(pixels, pairs[:, 1].long(), pairs[:, 2].float())


def soft_targets(labels: Tensor, mixed: Mixed, num_classes: int) -> Tensor:
    """Targets of the mixed images, from the labels before mixing: [B] -> [B, num_classes]; rows sum to 1."""
    own = F.one_hot(labels, num_classes).float()
    share = mixed.share.unsqueeze(-1)
    return (1 - share) * own + share * own[mixed.partner]
