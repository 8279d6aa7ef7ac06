"""ViTPose's backbone: ViT's layers in transformers' older form; no prefix token; heads read all tokens, in place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers.models.vitpose_backbone.modeling_vitpose_backbone import VitPoseBackbone, VitPoseBackboneEncoder

from ..token_state import TokenState
from .family import Family
from .layer import LayerMerging
from .older_vit import OLDER_VIT_LAYER, OLDER_VIT_PARTS


class VitPoseMerging(LayerMerging):
    """A layer's second argument is not a mask, but the dataset index, which chooses an expert."""

    def merged_forward(  # type: ignore[override]
        self, hidden_states: Tensor, state: TokenState, dataset_index: Tensor | None = None, **kwargs: Any
    ) -> Any:
        return super().merged_forward(hidden_states, state, None, **kwargs)


# Several experts need the dataset index in their MLP.
FAMILY = Family(
    encoders={VitPoseBackboneEncoder: "layer"},
    anatomy=replace(OLDER_VIT_LAYER, mlp="mlp"),
    models={VitPoseBackbone: "grid"},
    num_prefix_tokens=0,
    layer_parts=OLDER_VIT_PARTS,
    layer_merging=VitPoseMerging,
    required={"num_experts": (1, "only 1 expert can be merged.")},
)
