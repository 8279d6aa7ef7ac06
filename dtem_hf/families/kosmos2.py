"""Kosmos-2: CLIP's vision tower, and queries that attend to its tokens by their sizes."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F
from transformers.models.kosmos2.modeling_kosmos2 import (
    Kosmos2ForConditionalGeneration,
    Kosmos2Model,
    Kosmos2VisionModel,
    Kosmos2VisionTransformer,
)

from .clip import CLIP_LAYER
from .family import Family
from .readers import read_bias


class WeighedResampler:
    """Mixin for the attention of the queries, whose keys are the image tokens and then the queries themselves."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, **kwargs: Any) -> Any:
        if (bias := read_bias(encoder_hidden_states, hidden_states.dtype)) is not None:
            kwargs["attention_mask"] = F.pad(bias, (0, hidden_states.shape[1]))
        return super().forward(  # type: ignore[misc]
            hidden_states, encoder_hidden_states=encoder_hidden_states, **kwargs
        )


WRITERS = (Kosmos2Model, Kosmos2ForConditionalGeneration)
FAMILY = Family(
    encoders={Kosmos2VisionTransformer: "encoder.layers"},
    anatomy=CLIP_LAYER,
    models={Kosmos2VisionModel: "tokens", **dict.fromkeys(WRITERS, "weighed")},
    composites=WRITERS,
    model_parts={"image_to_text_projection.x_attn": WeighedResampler},
)
