"""ViTPose's backbone: ViT's layers in transformers' older form; no prefix token; heads read all tokens, in place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers.models.vitpose_backbone.modeling_vitpose_backbone import VitPoseBackbone, VitPoseBackboneEncoder

from ..errors import UnsupportedModelError
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


class VitPoseFamily(Family):
    """Several experts cannot be merged: their MLP needs the dataset index."""

    def check(self, model: nn.Module, encoder: Any) -> None:
        if encoder.config.num_experts > 1:
            raise UnsupportedModelError(f"num_experts={encoder.config.num_experts}: only 1 expert can be merged.")


FAMILY = VitPoseFamily(
    encoders={VitPoseBackboneEncoder: "layer"},
    anatomy=replace(OLDER_VIT_LAYER, mlp="mlp"),
    models={VitPoseBackbone: "grid"},
    num_prefix_tokens=0,
    layer_parts=OLDER_VIT_PARTS,
    layer_merging=VitPoseMerging,
)
