"""Idefics 3's vision tower."""

from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionTransformer

from tests.support.family_case import FamilyCase, Row
from tests.support.padded_patches import UNEVEN_RANGE, masked_images, padded_images, padded_tower


CASE = FamilyCase(
    "idefics3",
    encoder=Idefics3VisionTransformer,
    rows=(Row(Idefics3VisionTransformer, padded_tower(), "last_hidden_state"),),
    inputs=masked_images,
    uneven=padded_images,
    lacking={"onnx": UNEVEN_RANGE},
)
