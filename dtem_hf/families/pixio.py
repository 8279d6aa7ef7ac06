"""Pixio: ViT's layers with drop path behind several CLS tokens, which the config counts."""

from dataclasses import replace

from transformers.models.pixio.modeling_pixio import PixioModel

from .family import Family
from .vit import VIT_LAYER


# Its backbone is left out: transformers loads the two norms of a saved one in each other's place.
FAMILY = Family(
    encoders={PixioModel: "layers"},
    anatomy=replace(VIT_LAYER, branch1=("dropout", "drop_path"), branch2=("dropout", "drop_path")),
    models={PixioModel: "tokens"},
    num_prefix_tokens=0,
    prefix_fields=("n_cls_tokens",),
)
