"""VideoMAE: clips; no prefix token; a classifier that averages, and a decoder that needs every visible token."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.models.videomae.modeling_videomae import (
    VideoMAEForPreTraining,
    VideoMAEForVideoClassification,
    VideoMAEModel,
)

from ..errors import UnsupportedModelError
from .family import Family
from .older_vit import OLDER_VIT_LAYER, OLDER_VIT_PARTS, OlderViTMerging


class VideoMAEFamily(Family):
    """A classifier that does not average would read the first patch as if it were a CLS token."""

    def check(self, model: nn.Module, encoder: Any) -> None:
        if isinstance(model, VideoMAEForVideoClassification) and not encoder.config.use_mean_pooling:
            raise UnsupportedModelError(
                "use_mean_pooling=False: the classifier reads the first patch, which a merge may take away; use True."
            )


FAMILY = VideoMAEFamily(
    encoders={VideoMAEModel: "encoder.layer"},
    anatomy=OLDER_VIT_LAYER,
    models={VideoMAEModel: "tokens", VideoMAEForVideoClassification: "mean", VideoMAEForPreTraining: "grid"},
    num_prefix_tokens=0,
    input_fields=("num_frames", "image_size"),
    patch_fields=("tubelet_size", "patch_size"),
    composites=(VideoMAEForPreTraining,),
    layer_parts=OLDER_VIT_PARTS,
    layer_merging=OlderViTMerging,
)
