"""SigLIP 2 with patches of any aspect ratio (NaFlex): no prefix token; padding, which merges with no other token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers.models.siglip2.modeling_siglip2 import (
    Siglip2ForImageClassification,
    Siglip2Model,
    Siglip2VisionModel,
)

from ..errors import BadValue
from ..scope import current_state
from .clip import CLIP_LAYER
from .family import Family
from .readers import WeighedAttention


# From 5.24 on, transformers resizes the position embeddings by a matrix product.
POSITIONS_BY_PRODUCT = Version(transformers.__version__) >= Version("5.24")


class UnmaskedHead:
    """Mixin for the pooling head: behind a merge the mask has the wrong length, and sizes mark padding instead."""

    def forward(self, hidden_state: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        state = current_state()
        merged = state is not None and state.changed
        return super().forward(hidden_state, None if merged else attention_mask)  # type: ignore[misc]


class NaFlexFamily(Family):
    """Images come as patches, up to a number of them."""

    def num_tokens(self, encoder: Any, image_size: int | tuple[int, int] | None = None) -> int:
        if image_size is not None:
            raise BadValue("image_size", image_size, "none: the processor's max_num_patches sets the number of tokens")
        return encoder.config.num_patches

    def outside_cost(self, modules: Sequence[nn.Module]) -> tuple[int, ...]:
        stem, *others = super().outside_cost(modules)
        if POSITIONS_BY_PRODUCT:
            stem += sum(m.num_embeddings * m.embedding_dim for m in modules if isinstance(m, nn.Embedding))
        return stem, *others


FAMILY = NaFlexFamily(
    encoders={Siglip2VisionModel: "encoder.layers"},
    anatomy=CLIP_LAYER,
    models={Siglip2Model: "tokens", Siglip2VisionModel: "tokens", Siglip2ForImageClassification: "masked_mean"},
    num_prefix_tokens=0,
    patch_map="patch_embedding",
    padding_mask="pixel_attention_mask",
    composites=(Siglip2Model,),
    encoder_parts={"head": UnmaskedHead, "head.attention": WeighedAttention},
)
