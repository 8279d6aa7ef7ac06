"""DPT with its built-in ViT: heads that read the tokens of several layers, in place."""

from transformers.models.dpt.modeling_dpt import DPTForDepthEstimation, DPTForSemanticSegmentation, DPTModel

from .family import Family
from .older_vit import OLDER_VIT_LAYER, OLDER_VIT_PARTS, OlderViTMerging


HEADS = (DPTForDepthEstimation, DPTForSemanticSegmentation)
FAMILY = Family(
    encoders={DPTModel: "encoder.layer"},
    anatomy=OLDER_VIT_LAYER,
    models={DPTModel: "tokens", **dict.fromkeys(HEADS, "grid")},
    composites=HEADS,
    layer_parts=OLDER_VIT_PARTS,
    layer_merging=OlderViTMerging,
    required={"is_hybrid": (False, "its tokens come from a convolutional network, not from patches.")},
)
