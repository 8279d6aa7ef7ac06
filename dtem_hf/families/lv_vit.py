"""LV-ViT: ViT's layers behind convolutions; a classifier that reads the CLS token and all patch tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..extra_models.lv_vit import LVViTForImageClassification, LVViTModel, LVViTPatchEmbeddings
from ..scope import current_state
from .anatomy import convolution_cost, linear_cost
from .family import Family
from .vit import VIT_LAYER


class LiveLogits:
    """Mixin for the head whose maximum over patches counts: softly merged-away tokens get logits of -inf."""

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = super().forward(tokens)  # type: ignore[misc]
        state = current_state()
        sizes = None if state is None else state.final_sizes
        if state is None or sizes is None or sizes.shape[1] < state.num_tokens:  # no merge, or a hard one
            return logits
        places = state.source(-1) if state.unmerged else torch.arange(state.num_tokens, device=tokens.device)[None]
        inactive = places[:, state.num_prefix_tokens :, None] >= state.num_active
        return logits.masked_fill(inactive.to(logits.device), -torch.inf)


class LVViTFamily(Family):
    """The stem runs at several positions of a patch, the second head on each patch token."""

    def outside_cost(self, modules: Sequence[nn.Module]) -> tuple[int, ...]:
        stem, head, tail = super().outside_cost(modules)
        for module in modules:
            if isinstance(module, LVViTPatchEmbeddings):
                stem += (math.prod(module.projection.kernel_size) - 1) * convolution_cost(module.stem)
            if isinstance(module, LVViTForImageClassification):
                each = linear_cost([module.token_classifier])
                head, tail = head - 2 * each, tail + each  # per output token, without CLS
        return stem, head, tail


FAMILY = LVViTFamily(
    encoders={LVViTModel: "layers"},
    anatomy=VIT_LAYER,
    models={LVViTModel: "tokens", LVViTForImageClassification: "weighed"},
    model_parts={"token_classifier": LiveLogits},
)
