"""SigLIP: no prefix token; a head that attends to the tokens, or a classifier that averages them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from transformers.models.siglip.modeling_siglip import SiglipForImageClassification, SiglipModel, SiglipVisionModel

from .clip import CLIPLike
from .readers import WeighedAttention


class SiglipLike(CLIPLike):
    """Families without a prefix token, with a head that attends to the tokens."""

    def num_prefix_tokens(self, encoder: nn.Module) -> int:
        return 0

    def readers(self, model: nn.Module, encoder: Any) -> Iterator[tuple[nn.Module, type]]:
        if encoder.use_head:
            yield encoder.head.attention, WeighedAttention

    def outside_cost(self, modules: Sequence[nn.Module]) -> tuple[int, int, int]:
        stem, head, tail = super().outside_cost(modules)
        for pooling in (m for m in modules if isinstance(m, nn.MultiheadAttention)):
            width = pooling.embed_dim
            head += width**2  # the query of its one probe
            tail += 2 * width**2 + 2 * width  # key and value of a token, its score and its share
        return stem, head, tail


class SiglipFamily(SiglipLike):
    encoder_class = SiglipVisionModel
    models = {
        "AutoModel": (SiglipModel, SiglipVisionModel),
        "AutoModelForImageClassification": (SiglipForImageClassification,),
        "AutoModelForZeroShotImageClassification": (SiglipModel,),
    }
    composites = (SiglipModel,)
    averaging = (SiglipForImageClassification,)
