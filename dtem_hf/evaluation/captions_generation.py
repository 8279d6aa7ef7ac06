"""Generate captions with several methods and amounts of merging, in one pass over the images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..families import find_encoder
from ..models.vision import image_part
from .parts import Columns
from .variants import Variant, run_in_turn


@torch.inference_mode()
def caption_batch(
    variants: Sequence[Variant],
    tokenizer: Any,
    settings: Mapping[str, Any],
    device: torch.device,
    batch: dict[str, Tensor],
    first: int = 0,
) -> Columns:
    """Caption a batch with all R rows, starting with row `first`; `settings` go to `generate`.

    Returns `image_id` [B], `captions` [B, R] and `seconds_per_image` [1, R].
    """
    pixels = batch["pixel_values"].to(device=device, dtype=variants[0].model.dtype)
    written, seconds = run_in_turn(
        variants, lambda model: model.generate(pixel_values=pixels, **settings), device, first
    )
    captions = [[text.strip() for text in tokenizer.batch_decode(row, skip_special_tokens=True)] for row in written]
    return {
        "image_id": batch["image_id"].numpy(),
        "captions": np.array(captions, dtype=np.str_).T,
        "seconds_per_image": seconds[None] / len(pixels),
    }


@torch.no_grad()
def count_generation(variant: Variant, pixels: Tensor, settings: Mapping[str, Any]) -> dict[str, int]:
    """Multiply-adds of one caption of the largest length: of the image encoder, and of decoding (all else).

    `pixels` is [1, C, H, W]. If `generate` encodes the image once per beam, each of these counts.
    """
    length = settings["max_new_tokens"]
    with variant.ready() as model, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.generate(pixel_values=pixels, **{**settings, "min_new_tokens": length})
        encoder = find_encoder(model)[1]
        part = image_part(model, encoder)
        name = next(name for name, module in model.named_modules() if module is part)
    inside = counter.get_flop_counts().get(f"{type(model).__name__}.{name}", {})
    encoding = sum(inside.values()) // 2
    return {
        "encoder_multiply_adds": encoding,
        "decoding_multiply_adds": counter.get_total_flops() // 2 - encoding,
    }
