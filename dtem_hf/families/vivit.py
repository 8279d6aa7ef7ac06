"""ViViT: ViT's layers on clips; CLS, then the tubelets."""

from transformers.models.vivit.modeling_vivit import VivitForVideoClassification, VivitModel

from .family import Family
from .vit import VIT_LAYER


FAMILY = Family(
    encoders={VivitModel: "layers"},
    anatomy=VIT_LAYER,
    models={VivitModel: "tokens", VivitForVideoClassification: "tokens"},
    input_fields=("num_frames", "image_size"),
    patch_fields=("tubelet_size",),  # frames, height and width
)
