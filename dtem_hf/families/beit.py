"""BEiT: one CLS token, then the patches; a relative position bias that follows merged tokens; weighted means."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers.models.beit.modeling_beit import (
    BeitBackbone,
    BeitForImageClassification,
    BeitForSemanticSegmentation,
    BeitModel,
)

from ..token_state import TokenState
from .family import Family
from .readers import WeighedMean
from .relative_bias import RelativeBiasMerging, add_biases
from .vit import VIT_LAYER


class BeitMerging(RelativeBiasMerging):
    """A `BeitLayer` gets the model's shared relative position bias as its mask; it may also have its own bias."""

    def attention_inputs(
        self: Any, hidden_states: Tensor, attention_mask: Tensor | None, state: TokenState, kwargs: dict[str, Any]
    ) -> Tensor | None:
        interpolate, resolution = kwargs.pop("interpolate_pos_encoding", False), kwargs.pop("resolution", None)
        relative, grid = attention_mask, (0, 0)
        if relative is not None or self.relative_position_bias is not None:
            grid = resolution[0] // self.patch_size, resolution[1] // self.patch_size
            self.place_tokens(hidden_states, grid, state)
        if self.relative_position_bias is not None:
            num_tokens = state.num_tokens if self.merge_index else hidden_states.shape[1]
            relative = add_biases(relative, self.relative_position_bias(grid, interpolate, dim_size=num_tokens))
        return self.bias_with_sizes(hidden_states, relative, state, grid)


FAMILY = Family(
    encoders={BeitModel: "layers"},
    anatomy=replace(
        VIT_LAYER, branch1=("dropout", "lambda_1", "drop_path"), branch2=("dropout", "lambda_2", "drop_path")
    ),
    models={
        BeitModel: "tokens",
        BeitForImageClassification: "tokens",
        BeitForSemanticSegmentation: "grid",
        BeitBackbone: "grid",
    },
    composites=(BeitForSemanticSegmentation,),
    encoder_parts={"pooler": WeighedMean},
    layer_merging=BeitMerging,
)
