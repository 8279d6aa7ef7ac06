"""Pixio: ViT's layers with drop path; several CLS tokens (the config has their number), then the patches."""

from dataclasses import replace

from transformers.models.pixio.modeling_pixio import PixioModel

from .family import Family
from .vit import VIT_LAYER


# Pixio's backbone is left out: transformers exchanges its two norms when it loads a saved one.
FAMILY = Family(
    encoders={PixioModel: "layers"},
    anatomy=replace(VIT_LAYER, branch1=("dropout", "drop_path"), branch2=("dropout", "drop_path")),
    models={PixioModel: "tokens"},
    num_prefix_tokens=0,
    prefix_fields=("n_cls_tokens",),
)
