"""RADIO: DINOv2's layers; CLS tokens and registers (the config has their numbers), then the patches."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.radio.modeling_radio import RadioEncoder, RadioModel

from ..errors import UnsupportedModelError
from ..token_state import TokenState
from .dinov2 import DINOV2_LAYER, DINOV2_LAYER_PARTS
from .family import Family
from .layer import LayerMerging


class RadioMerging(LayerMerging):
    """Images of several sizes come as one packed sequence; in it, tokens of two images would merge."""

    def merged_forward(self, hidden_states: Tensor, state: TokenState, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("cu_seqlens") is not None:
            raise UnsupportedModelError("image_grid_hw: packed images cannot be merged; pass images of one size.")
        return super().merged_forward(hidden_states, state, *args, **kwargs)


FAMILY = Family(
    encoders={RadioEncoder: "layer"},
    anatomy=DINOV2_LAYER,
    models={RadioModel: "tokens"},
    num_prefix_tokens=0,
    prefix_fields=("num_cls_tokens", "num_registers"),
    patch_map="patch_projection",
    layer_parts=DINOV2_LAYER_PARTS,
    layer_merging=RadioMerging,
)
