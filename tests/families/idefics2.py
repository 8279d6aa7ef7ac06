"""Idefics 2's vision tower."""

from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionTransformer

from tests.support.family_case import FamilyCase, Row
from tests.support.padded_patches import UNEVEN_RANGE, masked_images, padded_images, padded_tower


CASE = FamilyCase(
    "idefics2",
    encoder=Idefics2VisionTransformer,
    rows=(Row(Idefics2VisionTransformer, padded_tower(), "last_hidden_state"),),
    inputs=masked_images,
    uneven=padded_images,
    lacking={"onnx": UNEVEN_RANGE},
)
