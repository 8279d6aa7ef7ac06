"""SigLIP 2 with patches as they come (NaFlex): no prefix token, and padding that is never merged with anything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
from .readers import MaskedAveraging
from .siglip import SiglipLike


# From then on, the grid of positions is resized by a matrix product.
POSITIONS_BY_PRODUCT = Version(transformers.__version__) >= Version("5.24")


class UnmaskedHead:
    """The pooling head: behind a merge, sizes say what is padding, and the mask has the wrong length."""

    def forward(self, hidden_state: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        state = current_state()
        if state is not None and state.changed:
            attention_mask = None
        return super().forward(hidden_state, attention_mask)  # type: ignore[misc]


class Siglip2Family(SiglipLike):
    encoder_class = Siglip2VisionModel
    models = {
        "AutoModel": (Siglip2Model, Siglip2VisionModel),
        "AutoModelForImageClassification": (Siglip2ForImageClassification,),
        "AutoModelForZeroShotImageClassification": (Siglip2Model,),
    }
    composites = (Siglip2Model,)

    def model_mixins(self, model_class: type) -> tuple[type, ...]:
        return (MaskedAveraging,) if issubclass(model_class, Siglip2ForImageClassification) else ()

    def readers(self, model: nn.Module, encoder: Any) -> Iterator[tuple[nn.Module, type]]:
        yield from super().readers(model, encoder)
        if encoder.use_head:
            yield encoder.head, UnmaskedHead

    def padding_sizes(self, encoder: nn.Module, inputs: Mapping[str, Any]) -> Tensor | None:
        mask = inputs.get("pixel_attention_mask")
        return None if mask is None else mask.float()

    def num_tokens(self, encoder: Any, image_size: int | tuple[int, int] | None = None) -> int:
        if image_size is not None:
            raise BadValue("image_size", image_size, "none: the processor's max_num_patches sets the number of tokens")
        return encoder.config.num_patches

    def outside_cost(self, modules: Sequence[nn.Module]) -> tuple[int, int, int]:
        stem, head, tail = super().outside_cost(modules)
        for embeddings in (m for m in modules if hasattr(m, "patch_embedding")):
            patch: Any = embeddings.patch_embedding  # a linear map of every patch
            stem, head = stem + patch.weight.numel(), head - patch.weight.numel()
            if POSITIONS_BY_PRODUCT:
                stem += embeddings.position_embedding.weight.numel()  # type: ignore[operator, union-attr]
        return stem, head, tail
